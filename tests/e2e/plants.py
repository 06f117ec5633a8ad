"""Faults that no setting provokes, planted in single processes of a run: which ones, says PLANTS.

verl imports this module through ``model.external_lib`` in the trainer, in every FSDP rank and in every vLLM server.
"""

import os
import time

PLANTS = os.environ["PLANTS"].split(",")


def train_rank_1_in_bf16() -> None:
    if os.environ.get("RANK") != "1" or is_server():
        return
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    original = FSDPEngine.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.engine_config.mixed_precision["verl_fp16"]["role"] == "actor":
            self.engine_config.mixed_precision["param_dtype"] = "bf16"

    FSDPEngine.__init__ = __init__


def is_server() -> bool:
    """verl's vLLM server says which replica it is before it builds the model's configuration, which imports this."""
    return "VERL_REPLICA_RANK" in os.environ


def before_vllm_starts(replica: int, change) -> None:
    """Call ``change`` with the arguments of vLLM's command line, in the server of one replica."""
    if os.environ.get("VERL_REPLICA_RANK") != str(replica):
        return
    from verl.workers.rollout.vllm_rollout import vllm_async_server as server

    # A function of the module: Ray has copied the methods of the actor's class before anything of it runs.
    original = server.build_cli_args_from_config

    def build_cli_args_from_config(config):
        config = dict(config)
        change(config)
        return original(config)

    server.build_cli_args_from_config = build_cli_args_from_config


def roll_out_replica_0_in_bf16() -> None:
    before_vllm_starts(0, lambda config: config.update(dtype="bfloat16"))


def leave_the_package_out_of_replica_1s_worker() -> None:
    before_vllm_starts(1, lambda config: os.environ.update(VERL_FP16_DISABLE="1"))


def silence_rank_1() -> None:
    if os.environ.get("RANK") == "1":
        from verl_fp16.readback import rank

        rank.report_training_worker = lambda worker: time.sleep(3600)


for plant in PLANTS:
    globals()[plant]()
