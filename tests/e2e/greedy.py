"""Greedy answers of a model folder by vLLM alone, in the dtype that the folder's ``config.json`` names.

python greedy.py MODEL_FOLDER ROWS.parquet TOKENS OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# One sequence at a time, as in the run that it is compared with: in a batch of another shape other kernels round.
ENGINE = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 1, "enable_prefix_caching": False}


def main(folder: str, rows: str, tokens: str, out: str) -> None:
    import pyarrow.parquet
    from vllm import LLM, SamplingParams

    llm = LLM(folder, **ENGINE)
    messages = [row["prompt"] for row in pyarrow.parquet.read_table(rows).to_pylist()]
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        for message in messages
    ]
    params = SamplingParams(temperature=0, max_tokens=int(tokens))
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    answers = [
        [text(ids), text(list(output.outputs[0].token_ids))] for ids, output in zip(prompts, outputs, strict=True)
    ]
    Path(out).write_text(json.dumps({"dtype": str(llm.llm_engine.model_config.dtype), "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
