#!/usr/bin/env python3
"""Set every key of verl's configuration that concerns precision to every other legal-looking value, and say what happens.

python scripts/precision_keys.py [--check]

Writes the table of keys x outcomes to docs/precision-keys.md, or checks that it is current. A value has to be refused or
warned of by the guard, or to show in what a run reads back from its workers. What does none of these is ``inert``.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from verl_fp16 import guard
from verl_fp16.findings import Finding, errors
from verl_fp16.guard.case import ABSENT, FSDP_SPELLINGS, GENERATION, NODE, ROLES, VLLM_SPELLINGS, Case, dtype_of
from verl_fp16.hooks import driver

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "precision-keys.md"

# The configurations that are walked.
BASES = {
    "fp16": ("+precision=fp16",),
    "bf16_train_fp16_rollout": ("+precision=bf16_train_fp16_rollout",),
    "fp16, PPO with critic and reference policy, on a CPU": (
        "+precision=fp16",
        "+hardware=cpu",
        "algorithm.adv_estimator=gae",
        "actor_rollout_ref.actor.use_kl_loss=true",
    ),
}

# A key concerns precision if its name or its value looks like it. Wide on purpose.
CONCERNS = re.compile(
    r"dtype|precision|quant|qat|fp8|fp16|bf16|float|autocast|(^|[._])amp|scal|log_?probs?|bypass|loss_mode|top_p|top_k"
    r"|temperature|strategy|model_engine|micro_batch_size|dynamic_bsz|token_len_per_gpu|merge|optimizer|fused|liger|kernel"
    r"|attn|kv_cache|checkpoint_engine\.backend|rollout\.name|no_sync|forward_only",
    re.IGNORECASE,
)
A_DTYPE = re.compile(r"(torch\.)?(b?float\d*|half|double|fp\d+|bf16|int[48]|w\d+a\d+)", re.IGNORECASE)

# Keys whose name or value only looks like precision; each with the reason. A test sees that they still exist.
NOT_PRECISION = {
    "*.loss_scale_factor": "divides the sum over tokens in the loss: a constant, in float32",
    "*.mtp_loss_scaling_factor": "weight of the loss of multi-token prediction",
    "*.top_k_reward": "",
}

REMOVED = "(removed)"
SPELLINGS = (
    *(16, "16", "fp16", "float16", "half", "torch.float16"),
    *("bf16", "bfloat16", "torch.bfloat16"),
    *(32, "32", "fp32", "float32", "float", "torch.float32"),
    *("fp8", "fp8_e4m3", "float64", "int8", "tf32", "mixed", "auto", "banana"),
)
NUMBERS = (-1, 0, 0.5, 1, 2, 7)
# Words that belong to one key.
WORDS = {
    "*strategy": ("fsdp", "fsdp2", "fsdp_turbo", "megatron", "mindspeed", "veomni", "torchtitan", "automodel"),
    "model_engine": ("dp", "megatron", "veomni", "torchtitan"),
    "*rollout.name": ("vllm", "sglang", "trtllm", "hf"),
    "*logprobs_mode": ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"),
    "*checkpoint_engine.backend": ("naive", "nccl", "nixl", "kimi_ckpt_engine", "mooncake", "delta_sharded"),
    "*loss_mode": ("vanilla", "bypass_mode"),
    "*quantization": ("fp8", "torchao", "ascend"),
    "*optimizer": ("AdamW", "SGD", "AdamW8bit", "_AdamW"),
    "*optimizer_impl": ("torch.optim", "torchao.optim", "bitsandbytes.optim"),
    "*attn_implementation": ("eager", "sdpa", "flash_attention_2"),
}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key whose value is no mapping with keys of its own."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from leaves(value, f"{prefix}{name}.")
    else:
        yield prefix[:-1], node


def concerns_precision(key: str, value: Any) -> bool:
    """The rule, without the exceptions of :data:`NOT_PRECISION`."""
    if key.endswith("._target_"):
        return False
    return bool(CONCERNS.search(key) or isinstance(value, str) and A_DTYPE.fullmatch(value))


def exception_for(key: str) -> str | None:
    """The pattern of :data:`NOT_PRECISION` that covers ``key``."""
    return next((pattern for pattern in NOT_PRECISION if fnmatch.fnmatchcase(key, pattern)), None)


def other_values(key: str, value: Any) -> Iterator[Any]:
    """Every other value that somebody might give this key."""
    words = [word for pattern, found in WORDS.items() if fnmatch.fnmatchcase(key, pattern) for word in found]
    if isinstance(value, bool):
        candidates = [not value, "banana", None, REMOVED]
    elif isinstance(value, int | float):
        candidates = [*NUMBERS, value * 2, "banana", None, REMOVED]
    else:
        candidates = [*words, *SPELLINGS, True, False, *NUMBERS[:3], None, REMOVED]
    told = [repr(value)]
    for candidate in candidates:
        if repr(candidate) not in told:
            told.append(repr(candidate))
            yield candidate


@dataclass(frozen=True)
class Row:
    """One key at one value: what the guard says, or what the read-back would show."""

    key: str
    value: Any
    outcome: str  # refused, warned, read back, same, inert
    detail: str = ""


class Walk:
    """One composed configuration, and what happens when one key of it is changed."""

    def __init__(self, overrides: tuple[str, ...]) -> None:
        with initialize_config_module("verl.trainer.config", version_base=None):
            self.config: DictConfig = compose("ppo_trainer", overrides=list(overrides))
        self.container, _ = driver.resolved(self.config)
        self.settings, _ = driver.read_node(self.config)
        self.verl = driver.installed_verl()
        self.base = set(map(_identity, self._check(self.container)))
        self.shown = read_back(self.container, self.verl)
        text = OmegaConf.to_yaml(self.config, resolve=False)
        self.sources = set(re.findall(r"\$\{(?:oc\.select:)?\s*([A-Za-z_][\w.]*)", text)) | {NODE}

    def _check(self, container: Mapping[str, Any]) -> list[Finding]:
        return guard.check(container, self.settings, verl=self.verl)

    def rows(self) -> Iterator[Row]:
        """Every key that concerns precision, at every other value."""
        for key, value in leaves(self.container):
            if concerns_precision(key, value) and exception_for(key) is None:
                for other in other_values(key, value):
                    yield self.row(key, other)

    def row(self, key: str, value: Any) -> Row:
        """What happens when ``key``, which may be new, is set to ``value``."""
        if any(key == source or key.startswith(f"{source}.") for source in self.sources):
            findings, container = self._resolved_anew(key, value)
        else:
            container = with_value(self.container, key, value)
            findings = self._check(container)
        new = [finding for finding in findings if _identity(finding) not in self.base]
        if new:
            return Row(key, value, "refused" if errors(new) else "warned", new[0].why)
        shown = read_back(container, self.verl)
        changed = sorted(name for name in shown if shown[name] != self.shown.get(name))
        if changed:
            return Row(key, value, "read back", ", ".join(changed))
        return Row(key, value, "same" if self.means_the_same(key, value) else "inert")

    def _resolved_anew(self, key: str, value: Any) -> tuple[list[Finding], dict[str, Any]]:
        """For a key that others interpolate: set in the configuration itself, as an override is."""
        config = copy.deepcopy(self.config)
        with open_dict(config):
            if value == REMOVED:
                parent, _, name = key.rpartition(".")
                node = OmegaConf.select(config, parent) if parent else config
                node.pop(name, None)
            else:
                OmegaConf.update(config, key, value, force_add=True)
        return driver.examine(config), driver.resolved(config)[0]

    def means_the_same(self, key: str, value: Any) -> bool:
        """Whether ``value`` is another way to write what is there: in the reader's spelling, or verl's own default."""
        before = Case(self.container, None, self.verl).get(key)
        if value == REMOVED:
            return before is ABSENT or default_of(self.container, key) == before or before is None
        for spellings in (VLLM_SPELLINGS if key.startswith((GENERATION, "distillation")) else FSDP_SPELLINGS,):
            if dtype_of(value, spellings) is not None and dtype_of(value, spellings) == dtype_of(before, spellings):
                return True
        if key.endswith("strategy"):
            return value in ("fsdp", "fsdp2")
        return value == before and isinstance(value, bool) == isinstance(before, bool)


def _identity(finding: Finding) -> tuple[str, str, str]:
    return finding.severity, finding.key, finding.why


def with_value(container: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy along the way to ``key``, in which it has ``value``, or is removed."""
    name, _, rest = key.partition(".")
    copied = dict(container)
    if rest:
        below = copied.get(name)
        copied[name] = with_value(below if isinstance(below, Mapping) else {}, rest, value)
    elif value == REMOVED:
        copied.pop(name, None)
    else:
        copied[name] = value
    return copied


# Where no dataclass says it: the defaults in the code of FSDPEngine._build_fsdp_module and of the trainers.
DEFAULTS_IN_CODE = {
    "*.mixed_precision.reduce_dtype": "fp32",
    "*.mixed_precision.buffer_dtype": "fp32",
}


def default_of(container: Mapping[str, Any], key: str) -> Any:
    """What verl takes where ``key`` is missing: its dataclass's default."""
    for pattern, value in DEFAULTS_IN_CODE.items():
        if fnmatch.fnmatchcase(key, pattern):
            return value
    parent, _, name = key.rpartition(".")
    target = Case(container, None, "").get(f"{parent}._target_" if parent else "_target_", None)
    return _field_defaults(target).get(name, ABSENT) if isinstance(target, str) else ABSENT


@functools.cache
def _field_defaults(target: str) -> dict[str, Any]:
    module, _, name = target.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def read_back(container: Mapping[str, Any], verl: str) -> dict[str, Any]:
    """What the read-back of a run with this configuration would show, by verl's own defaults."""
    case = Case(container, None, verl)
    shown: dict[str, Any] = {}
    for role in ROLES:
        mixed = case.children(f"{role.engine}.mixed_precision")
        for field, value in (
            ("autocast", mixed.get("param_dtype", "bf16")),
            ("reduce", mixed.get("reduce_dtype", "fp32")),
            ("buffers", mixed.get("buffer_dtype", "fp32")),
            ("master", case.get(f"{role.engine}.model_dtype", "fp32")),
        ):
            shown[f"{role.name} {field}"] = dtype_of(value, FSDP_SPELLINGS)
        if shown[f"{role.name} autocast"] == "float16":
            shown[f"{role.name} scaler"] = (mixed.get(NODE) or {}).get("loss_scale")
        model = "critic.model" if role.name == "critic" else "actor_rollout_ref.model"
        shown[f"{role.name} attention"] = case.get(f"{model}.override_config.attn_implementation", "flash_attention_2")
    shown["rollout model"] = dtype_of(case.get(f"{GENERATION}.dtype", "bfloat16"), VLLM_SPELLINGS)
    return shown
