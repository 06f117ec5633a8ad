"""vLLM's entry point ``vllm.general_plugins``, which it loads in its server, engine core and workers.

vLLM may build its model before it imports verl. So the CPU room is put in place here as well, in processes that were
told to run on the CPU and in no other.
"""


def load() -> None:
    """Put the CPU room into this process if the run chose it. Idempotent."""
    from verl_fp16.cpu.choice import chosen_by_environment

    if chosen_by_environment():
        from verl_fp16.cpu.activate import activate

        activate()
