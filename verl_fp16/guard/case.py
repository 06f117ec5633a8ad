"""What the rules look at, and the spellings of a dtype that each reader of the configuration knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from verl_fp16.findings import Finding
from verl_fp16.settings import DTYPES, Settings

NODE = "verl_fp16"
TRAIN, ROLLOUT = f"{NODE}.train_dtype", f"{NODE}.rollout_dtype"

# Names of settings that say a dtype. Wide: what it takes in wrongly is named in the guard's rules.
PRECISION_WORDS = re.compile(
    r"dtype|precision|fp16|bf16|fp8|float|half|(^|_)amp(_|$)|quantiz|grad_scal|loss_scale$", re.IGNORECASE
)


class _Absent:
    def __repr__(self) -> str:
        return "(not set)"


ABSENT = _Absent()

# verl.utils.torch_dtypes.PrecisionType.to_dtype raises in the worker for anything else.
FSDP_SPELLINGS = {
    **dict.fromkeys((16, "16", "fp16", "float16"), "float16"),
    **dict.fromkeys((32, "32", "fp32", "float32"), "float32"),
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
}
# vllm.config.model.ModelDType; its "auto" takes the dtype of the checkpoint, float16 for a float32 one.
VLLM_SPELLINGS = {
    **dict.fromkeys(("half", "float16"), "float16"),
    **dict.fromkeys(("float", "float32"), "float32"),
    "bfloat16": "bfloat16",
}


def dtype_of(value: Any, spellings: Mapping[Any, str]) -> str | None:
    """The dtype that ``value`` means to the reader with these spellings; None if it knows no such."""
    known = isinstance(value, str | int | float) and not isinstance(value, bool)
    return spellings.get(value) if known else None


@dataclass(frozen=True)
class Role:
    """A role that verl trains or evaluates with an engine.

    Args:
        name: ``actor``, ``ref`` or ``critic``.
        section: key of the role's configuration.
        engine: key of its FSDP engine's.
        forward_only: whether it is never trained.
    """

    name: str
    section: str
    engine: str
    forward_only: bool = False


ROLES = (
    Role("actor", "actor_rollout_ref.actor", "actor_rollout_ref.actor.fsdp_config"),
    Role("ref", "actor_rollout_ref.ref", "actor_rollout_ref.ref.fsdp_config", forward_only=True),
    Role("critic", "critic", "critic.fsdp"),
)
MODELS = ("actor_rollout_ref.model", "critic.model")
GENERATION = "actor_rollout_ref.rollout"


# What each engine does with a declared float16, read in workers/engine of verl 0.8.0-0.9.1.
OTHER_ENGINES = {
    "fsdp_turbo": "it takes its dtypes from turbo_config.distributed.fsdp_plan and has no loss scaler of ours",
    "megatron": "its dtype is megatron.dtype and its loss scaling Megatron's own; this package touches neither",
    "mindspeed": "it is Megatron's stand-in on NPUs, and takes its dtype as Megatron does",
    "mindspeed_megatron": "it computes in bfloat16 or not at all in half precision, by the dtype of the checkpoint",
    "veomni": "it takes bfloat16 or float32 from its own mixed_precision and sends weights in bfloat16",
    "torchtitan": "its autocast is bfloat16, whatever is set",
    "automodel": "its autocast is bfloat16, whatever is set",
}


@dataclass(frozen=True)
class Case:
    """One configuration under examination; see :func:`verl_fp16.guard.check`."""

    config: Mapping[str, Any]
    settings: Settings | None
    verl: str
    entry: str = ""

    def get(self, key: str, default: Any = ABSENT) -> Any:
        """The value at a dotted key; ``default`` where any part of the way is missing."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def children(self, key: str) -> Mapping[str, Any]:
        """The mapping at a dotted key; empty where there is none."""
        node = self.get(key)
        return node if isinstance(node, Mapping) else {}

    def set_to(self, key: str, value: Any) -> str:
        """The override that gives ``key`` this value, whether it is there or not."""
        return f"{'' if self.get(key) is not ABSENT else '+'}{key}={value}"

    @cached_property
    def fsdp_roles(self) -> tuple[Role, ...]:
        """The roles that are there, without those of an engine whose configuration is not FSDP's."""
        if str(self.get("model_engine", "dp")) in OTHER_ENGINES:
            return ()
        there = (role for role in ROLES if self.children(role.section))
        return tuple(role for role in there if str(self.get(f"{role.section}.strategy")) not in OTHER_ENGINES)

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The roles of :attr:`fsdp_roles` whose engine has a configuration."""
        return tuple(role for role in self.fsdp_roles if isinstance(self.get(role.engine), Mapping))

    @cached_property
    def has_critic(self) -> bool:
        """Whether verl trains a critic (``verl.trainer.ppo.utils.need_critic``)."""
        enable = self.get("critic.enable", None)
        return bool(enable) if enable is not None else self.get("algorithm.adv_estimator", None) == "gae"

    @cached_property
    def train(self) -> str | None:
        """The declared compute dtype of training; None where the declaration itself is wrong."""
        return self._declared(TRAIN)

    @cached_property
    def rollout(self) -> str | None:
        """The declared dtype of the rollout; None where the declaration itself is wrong."""
        return self._declared(ROLLOUT)

    def _declared(self, key: str) -> str | None:
        value = self.get(key)
        return value if isinstance(value, str) and value in DTYPES else None


Rule = Callable[[Case], Iterator[Finding]]
