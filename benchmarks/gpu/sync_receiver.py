"""vLLM with verl's worker extension: does what each line on stdin says, and answers with a line.

``python sync_receiver.py MODEL DEVICE``; a line is a JSON list of the worker's method and its arguments.
"""

from __future__ import annotations

import json
import sys


def main(model: str, device: str) -> None:
    import verl  # noqa: F401  its plugins are loaded
    from vllm import LLM

    llm = LLM(
        model,
        dtype="float16",
        load_format="dummy",
        enforce_eager=True,
        max_model_len=64,
        gpu_memory_utilization=0.3,
        worker_extension_cls="verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension",
    )
    print("READY", flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        kwargs = {"use_shm": device == "cpu"} if method == "update_weights_from_ipc" else {}
        (answer,) = llm.collective_rpc(method, args=tuple(arguments), kwargs=kwargs)
        print(f"DONE {json.dumps(json.loads(answer) if answer else {})}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
