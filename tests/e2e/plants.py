"""Faults that no setting provokes, planted in single processes of a run: which ones, says PLANTS.

verl imports this module through ``model.external_lib`` in the trainer, in every FSDP rank and in every vLLM server.
"""

import os
import sys
import time

PLANTS = os.environ["PLANTS"].split(",")


def train_rank_1_in_bf16() -> None:
    engine = sys.modules.get("verl.workers.engine.fsdp.transformer_impl")
    if engine is None or os.environ.get("RANK") != "1":
        return
    original = engine.FSDPEngine.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.engine_config.mixed_precision["verl_fp16"]["role"] == "actor":
            self.engine_config.mixed_precision["param_dtype"] = "bf16"

    engine.FSDPEngine.__init__ = __init__


def before_server_starts(replica: int, change) -> None:
    module = sys.modules.get("verl.workers.rollout.vllm_rollout.vllm_async_server")
    if module is None:
        return
    original = module.vLLMHttpServer._preprocess_engine_kwargs

    def _preprocess_engine_kwargs(self, engine_kwargs):
        original(self, engine_kwargs)
        if self.replica_rank == replica:
            change(engine_kwargs)

    module.vLLMHttpServer._preprocess_engine_kwargs = _preprocess_engine_kwargs


def roll_out_replica_0_in_bf16() -> None:
    before_server_starts(0, lambda engine_kwargs: engine_kwargs.update(dtype="bfloat16"))


def leave_the_package_out_of_replica_1s_worker() -> None:
    before_server_starts(1, lambda engine_kwargs: os.environ.update(VERL_FP16_DISABLE="1"))


def silence_rank_1() -> None:
    if os.environ.get("RANK") == "1":
        from verl_fp16.readback import rank

        rank.report_training_worker = lambda worker: time.sleep(3600)


for plant in PLANTS:
    globals()[plant]()
