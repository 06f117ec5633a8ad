"""The memory that ``verl-fp16 preflight`` takes, against the largest shard of the model that it looks at.

    python benchmarks/preflight_memory.py [--layers 24] [--shards 8] [--out outputs/preflight-memory.json]

A checkpoint of a Qwen3 with random BF16 weights is generated, about 2 GB with the defaults, shard by shard. A child
process imports what the command imports, notes its resident memory, and runs the command, both halves with their
defaults (and the weights alone beforehand, by themselves, in another child). A thread of it samples the resident memory
every few milliseconds. What is told is the most of it above what it was after the imports. Everything resident counts,
mapped files too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from off_cost import machine_facts, write_result  # noqa: E402

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, HEAD_DIM, VOCABULARY = 1536, 6144, 16, 8, 128, 32768
SAMPLE_S = 0.002


def generate(folder: Path, layers: int, shards: int) -> None:
    """A Qwen3 with its embedding and its head apart, in ``shards`` files of about the same size, with an index."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    from verl_fp16.quickstart.tokenizer import build_tokenizer

    build_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = dict(tensor_shapes(layers))
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    number = written = 0

    def write() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held.clear()

    for name, shape in shapes.items():
        norm = "norm" in name
        held[name] = torch.ones(shape) if norm else torch.randn(shape, generator=generator) * 0.02
        held[name] = held[name].bfloat16()
        written += held[name].nbytes
        if number < shards - 1 and written >= (number + 1) * size / shards:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def tensor_shapes(layers: int) -> Any:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.k_proj", (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.v_proj", (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
            ("self_attn.q_norm", (HEAD_DIM,)),
            ("self_attn.k_norm", (HEAD_DIM,)),
            ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def run_here(folder: str, options: list[str]) -> None:
    """In the child: the last line on stdout is what was measured, all before it the command's."""
    import psutil
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from accelerate import init_empty_weights  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from typer.testing import CliRunner

    import verl_fp16.guard.model
    import verl_fp16.preflight.run
    import verl_fp16.preflight.run_verdict  # noqa: F401
    from verl_fp16.cli.app import app

    verl_fp16.guard.model.refused_in_float16()
    torch.set_num_threads(1)
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info()
    samples = [before]  # those that were the most when they were taken

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            now = process.memory_info()
            if now.rss > samples[-1].rss:
                samples.append(now)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.monotonic()
    result = CliRunner().invoke(app, ["preflight", folder, *options, "--json"])
    seconds = time.monotonic() - started
    done.set()
    sampler.join()
    found, peak = json.loads(result.stdout), samples[-1]
    print(
        json.dumps(
            {
                "after_imports": before.rss,
                "peak": peak.rss,
                "above_imports": peak.rss - before.rss,
                "of_it_in_files": peak.shared - before.shared,
                "seconds": seconds,
                "verdict": found["verdict"],
                "exit_code": result.exit_code,
                "tokens": found.get("run", {}).get("tokens"),
            }
        )
    )


def run_child(folder: Path, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), *options]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the measurement failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    size, shard = result["checkpoint_bytes"] / 1e9, result["largest_shard_bytes"] / 1e6
    table = Table(title=f"{size:.2f} GB in {result['shards']} shards, the largest {shard:.0f} MB; {result['machine']}")
    for column in ("preflight", "above imports, MB", "of the largest shard", "seconds", "verdict"):
        table.add_column(column, justify="right")
    for name in ("weights_only", "both_halves"):
        row = result[name]
        share = row["above_imports"] / result["largest_shard_bytes"]
        above = f"{row['above_imports'] / 1e6:.0f}"
        table.add_row(name.replace("_", " "), above, f"{share:.2f}", f"{row['seconds']:.0f}", row["verdict"])
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("outputs") / "preflight-memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.child:
        run_here(options.child, rest)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), options.layers, options.shards)
        sizes = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
        result = {
            **machine_facts(),
            "checkpoint_bytes": sum(sizes),
            "shards": len(sizes),
            "largest_shard_bytes": max(sizes),
            "weights_only": run_child(Path(folder), ["--weights-only"]),
            "both_halves": run_child(Path(folder), []),
        }
    print_table(result)
    write_result(result, options.out)


if __name__ == "__main__":
    main()
