#!/usr/bin/env python3
"""Set every key of the configuration that concerns precision to every other legal-looking value; say what happens.

python scripts/precision_keys.py [--check]

Writes the table of keys x outcomes to docs/precision-keys.md, or checks that it is current. A value has to be refused
or warned of by the guard, or to show in what a run reads back from its workers. What does none of these is ``inert``.
"""

from __future__ import annotations

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

from verl_fp16 import guard, plugin
from verl_fp16.findings import Finding, errors
from verl_fp16.guard.case import ABSENT, FSDP_SPELLINGS, GENERATION, NODE, ROLES, VLLM_SPELLINGS, Case, dtype_of
from verl_fp16.guard.optimizer import FULL_PRECISION
from verl_fp16.guard.weight_sync import EXACT
from verl_fp16.hooks import driver

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "precision-keys.md"

# The configurations that are walked.
BASES = {
    "fp16": ("+precision=fp16",),
    "bf16_train_fp16_rollout": ("+precision=bf16_train_fp16_rollout",),
    "fp16, PPO with critic, reference policy and a teacher, on a CPU": (
        "+precision=fp16",
        "+hardware=cpu",
        "algorithm.adv_estimator=gae",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "distillation.enabled=true",
    ),
}

# A key concerns precision if its name or its value looks like it. Wide on purpose.
CONCERNS = re.compile(
    r"dtype|precision|quant|qat|fp8|fp16|bf16|float|autocast|(^|[._])amp|scal|log_?probs?|bypass|top_p|top_k"
    r"|temperature|strategy|model_engine|micro_batch_size|dynamic_bsz|token_len_per_gpu|merge|optimizer|fused|liger|kernel"
    r"|attn|kv_cache|checkpoint_engine\.backend|rollout\.name|no_sync|forward_only",
    re.IGNORECASE,
)
A_DTYPE = re.compile(r"(torch\.)?(b?float\d*|half|double|fp\d+|bf16|int[48]|w\d+a\d+)", re.IGNORECASE)

# Keys whose name or value only looks like precision; each with the reason. A test sees that they still exist.
NOT_PRECISION = {
    "verl_fp16.read_back_timeout_s": "how long the read-back waits",
    "verl_fp16.sync.*": "policy and audit of the weight sync; what is no policy or number is refused",
    "verl_fp16.mismatch.*": "when the gap is told of, and what is kept of it; what is out of range is refused",
    "*.loss_scale_factor": "divides the sum over tokens in the loss: a constant, in float32",
    "*.mtp_loss_scaling_factor": "weight of the loss of multi-token prediction",
    "*.optimizer_offload": "where the optimizer's state is kept, not in which dtype",
    "*.qat.[!e]*": "read only where qat.enable is set, which is refused",
    "*.ppo_micro_batch_size": "the old name, which verl refuses beside ..._per_gpu",
    "*.rollout.log_prob_micro_batch_size": "the old name, which verl refuses beside ..._per_gpu",
    "*.use_dynamic_bsz": "how batches are cut; where it is set, the limits of log-prob and update are compared",
    "*.actor.ppo_max_token_len_per_gpu": "read with use_dynamic_bsz only; the other limit follows it",
    "*.rollout.log_prob_max_token_len_per_gpu": "read with use_dynamic_bsz only, and then compared with the update's",
    "*.ref.log_prob_*": "batches of the reference policy: no rollout's log-probs are compared with them",
    "*.ref.fsdp_config.use_no_sync_*": "the reference policy has no gradients",
    "critic.*micro_batch_size*": "batches of the critic: nothing of the rollout is compared with its values",
    "critic.*token_len_per_gpu": "batches of the critic: nothing of the rollout is compared with its values",
    "critic.model.lora.merge": "the critic's weights are not sent to a rollout",
    "actor_rollout_ref.model.lora.merge": "merged or not, the rollout gets the trained weights in its dtype",
    "*precision_debugger.*": "settings of a profiler",
    "actor_rollout_ref.rollout.temperature": "in both sides' log-probs while logprobs_mode is processed_logprobs; "
    "warned of otherwise; one that float16 cannot divide by is refused",
    "*.val_kwargs.*": "sampling in validation, whose log-probs are compared with nothing",
    "*.fused_kernel_options.impl_backend": "read only where use_fused_kernels is set, and judged then",
    "reward_model.*": "a model of its own: its scores are compared with no log-probs",
    "reward.*": "a model of its own: its scores are compared with no log-probs",
    "distillation.distillation_loss.log_prob_min_clamp": "a bound in the distillation loss, in float32",
    "distillation.*.temperature": "the temperature of the teacher, not a dtype",
    "trainer.v1.sampler.max_off_policy_strategy": "what is done with old samples",
}

# Keys that nothing reads while a switch is off; a test sees that one of BASES has the switch on.
SWITCHES = {"distillation.teacher_models.*": "distillation.enabled"}

# Values that mean what is there already, though they are written otherwise; with the reason.
MEAN_THE_SAME = {
    "*strategy": (("fsdp", "fsdp2"), "both FSDP engines read the same dtypes"),
    "*.optim.optimizer": (FULL_PRECISION, "the moments are float32, as AdamW's are"),
    "actor_rollout_ref.rollout.name": (("vllm",), "the rollout that is covered; verl needs a name"),
    "actor_rollout_ref.rollout.top_k": ((-1, 0), "off"),
    "*actor_rollout_ref.model.use_fused_kernels": (
        (True, False),
        "the torch backend's numbers are the usual way's, in float32 from float16 logits; other backends are judged",
    ),
    "*.checkpoint_engine.backend": (EXACT, "weights are sent in the dtype that they have"),
}
# Keys that may be missing, because nothing reads them or the code has the same default; verl's dataclasses are asked
# for the rest.
DEFAULTS_IN_CODE = {
    "*.mixed_precision.param_dtype": "bf16 in FSDPEngine._build_fsdp_module; refused where another dtype is declared",
    "*strategy": "fsdp in verl's dataclasses",
    "actor_rollout_ref.rollout.name": "verl stops without it",
    "model_engine": "the group is applied when the configuration is composed",
    "*.fsdp_config.dtype": "nothing reads it",
    "critic.fsdp.dtype": "nothing reads it",
    "*.turbo_config.*": "read by an engine that is refused",
    "*.mixed_precision.reduce_dtype": "fp32 in FSDPEngine._build_fsdp_module",
    "*.mixed_precision.buffer_dtype": "fp32 in FSDPEngine._build_fsdp_module",
    "*.qat.enable": "false where it is read",
    "algorithm.rollout_correction.bypass_mode": "false where it is read",
    "verl_fp16.critic_loss_scale.*": "the default of verl_fp16/settings.py",
    "verl_fp16.fault_injection": "no faults, in verl_fp16/settings.py",
}

REMOVED = "(removed)"
NO_SYNC = "use_no_sync_for_gradient_accumulation"
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
        plugin.require_active()  # the flag's values need its resolver
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=list(overrides))
        self.container, unresolved = driver.resolved(config)
        if unresolved:
            raise ValueError(f"{overrides}: {unresolved}")
        self.settings, _ = driver.read_node(config)
        self.verl = driver.installed_verl()
        self.base = set(map(_identity, guard.check(self.container, self.settings, verl=self.verl)))
        self.shown = read_back(self.container, self.verl)
        self.sources, self.interpolated = self._interpolated(config)

    def _interpolated(self, config: DictConfig) -> tuple[set[str], DictConfig]:
        """What other keys are made from, and the configuration with these interpolations alone: resolved fast."""
        written = {key: str(value) for key, value in leaves(OmegaConf.to_container(config, resolve=False))}
        sources = set(re.findall(r"\$\{(?:oc\.select:)?\s*([A-Za-z_][\w.]*)", " ".join(written.values())))
        of_precision = [key for key, value in leaves(self.container) if concerns_precision(key, value)]
        sources = {NODE} | {source for source in sources if any(_is_at(key, source) for key in of_precision)}
        container = self.container
        for key, text in written.items():
            if any(source in text for source in sources) and "${" in text:
                container = with_value(container, key, text)
        return sources, OmegaConf.create(container)

    def rows(self) -> Iterator[Row]:
        """Every key that concerns precision, at every other value."""
        for key, value in leaves(self.container):
            if concerns_precision(key, value) and exception_for(key) is None and not self.is_switched_off(key):
                for other in other_values(key, value):
                    yield self.row(key, other)

    def is_switched_off(self, key: str) -> bool:
        """Whether nothing reads ``key`` here, because what it belongs to is off."""
        case = Case(self.container, None, self.verl)
        return any(fnmatch.fnmatchcase(key, keys) and not case.get(switch) for keys, switch in SWITCHES.items())

    def row(self, key: str, value: Any) -> Row:
        """What happens when ``key``, which may be new, is set to ``value``."""
        if any(_is_at(key, source) for source in self.sources):
            findings, container = self._resolved_anew(key, value)
        else:
            container = with_value(self.container, key, value)
            findings = guard.check(container, self.settings, verl=self.verl)
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
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(self.interpolated, parent)
        before = OmegaConf.to_container(node, resolve=False).get(name, REMOVED)
        try:
            _set(node, name, value)
            settings, found = driver.read_node(self.interpolated)
            container, unresolved = driver.resolved(self.interpolated, placeholders=settings is None)
            return [*found, *unresolved, *guard.check(container, settings, verl=self.verl)], container
        finally:
            _set(node, name, before)

    def _is_fsdp2(self, key: str) -> bool:
        """Whether ``key`` is the deferred gradient sync of a role on FSDP2."""
        section = next((role.section for role in ROLES if key == f"{role.engine}.{NO_SYNC}"), "")
        return Case(self.container, None, self.verl).get(f"{section}.strategy") == "fsdp2"

    def means_the_same(self, key: str, value: Any) -> bool:
        """Whether ``value`` is another way to write what is there: in the reader's spelling, or verl's own default."""
        before = Case(self.container, None, self.verl).get(key)
        if value == REMOVED:
            known = any(fnmatch.fnmatchcase(key, pattern) for pattern in DEFAULTS_IN_CODE)
            return known or before is None or default_of(self.container, key) == before or self._is_fsdp2(key)
        spellings = VLLM_SPELLINGS if key.startswith((GENERATION, "distillation")) else FSDP_SPELLINGS
        if dtype_of(value, spellings) is not None and dtype_of(value, spellings) == dtype_of(before, spellings):
            return True
        for pattern, (values, _) in MEAN_THE_SAME.items():
            if fnmatch.fnmatchcase(key, pattern) and value in values:
                return True
        if key.endswith(NO_SYNC):
            return self._is_fsdp2(key)  # which adds gradients up in float32 either way
        return value == before and isinstance(value, bool) == isinstance(before, bool)


def _is_at(key: str, place: str) -> bool:
    return key == place or key.startswith(f"{place}.")


def _set(node: DictConfig, name: str, value: Any) -> None:
    with open_dict(node):
        node.pop(name, None)
        if value != REMOVED:
            node[name] = value


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


def default_of(container: Mapping[str, Any], key: str) -> Any:
    """What verl takes where ``key`` is missing: its dataclass's default."""
    parent, _, name = key.rpartition(".")
    target = Case(container, None, "").get(f"{parent}._target_", None)
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


# Keys that nobody knows, added with +.
ADDED = (
    *(
        (f"{role.engine}.mixed_precision.{name}", "float16")
        for role in ROLES
        for name in ("foo", "param_dtyp", "dtype")
    ),
    *((f"{role.engine}.{name}", "float16") for role in ROLES for name in ("dtypes", "param_dtype", "autocast_dtype")),
    *((f"{role.section}.{name}", "float16") for role in ROLES for name in ("dtype", "precision", "model_dtype")),
    *((f"{GENERATION}.{name}", "fp8") for name in ("dtypes", "kv_cache_dtype", "model_dtype")),
    *(
        (f"{GENERATION}.engine_kwargs.vllm.{name}", "bfloat16")
        for name in ("dtype", "kv_cache_dtype", "kv-cache-dtype")
    ),
    *(
        (f"{GENERATION}.engine_kwargs.vllm.{name}", "fp8")
        for name in ("quantization", "kv_cache_dtype", "mamba_cache_dtype")
    ),
    (f"{GENERATION}.engine_kwargs.vllm.logprobs_mode", "raw_logits"),
    (f"{GENERATION}.engine_kwargs.vllm.hf_overrides", {"torch_dtype": "bfloat16"}),
    (f"{GENERATION}.engine_kwargs.sglang.dtype", "float16"),
    *((f"actor_rollout_ref.model.override_config.{name}", "bfloat16") for name in ("dtype", "torch_dtype")),
    ("critic.model.override_config.torch_dtype", "bfloat16"),
    ("actor_rollout_ref.model.torch_dtype", "bfloat16"),
    ("actor_rollout_ref.actor.optim.override_optimizer_config.exp_avg_dtype", "bf16"),
    ("verl_fp16.x", 1),
    ("verl_fp16.loss_scale.grow_factor", 2.0),
)


def results() -> dict[str, tuple[list[Row], list[Row]]]:
    """For each of :data:`BASES`: its keys at other values, and keys that are new."""
    walks = {name: Walk(overrides) for name, overrides in BASES.items()}
    return {name: (list(walk.rows()), [walk.row(*added) for added in ADDED]) for name, walk in walks.items()}


def document(found: Mapping[str, tuple[list[Row], list[Row]]]) -> str:
    """The table, as Markdown."""
    lines = [
        "# Settings that concern precision",
        "",
        "<!-- Written by scripts/precision_keys.py. -->",
        "",
        "What happens when one key of a configuration with the flag is set to another value. *Refused* and *warned*:",
        "by the guard, before Ray starts. *Read back*: the value lands in what the run reads back from its workers.",
        "*Same*: another spelling of what is there, or verl's own default. *Inert*: accepted and ignored.",
    ]
    for name, overrides in BASES.items():
        rows, added = found[name]
        lines += ["", f"## {name}", "", f"`{' '.join(overrides)}`", "", _counts(rows, added), "", *_table(rows, added)]
    lines += ["", "## Keys that only look like precision", "", "| key | why not |", "|---|---|"]
    lines += [f"| `{pattern}` | {reason} |" for pattern, reason in NOT_PRECISION.items()]
    return "\n".join([*lines, ""])


OUTCOMES = ("refused", "warned", "read back", "same", "inert")


def _counts(rows: list[Row], added: list[Row]) -> str:
    every = [*rows, *added]
    counts = [f"{sum(row.outcome == outcome for row in every)} {outcome}" for outcome in OUTCOMES]
    return f"{len({row.key for row in every})} keys, {len(every)} rows: {', '.join(counts)}."


def _table(rows: list[Row], added: list[Row]) -> list[str]:
    lines = [f"| key | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * len(OUTCOMES)}"]
    new = {row.key for row in added}
    for key in dict.fromkeys(row.key for row in [*rows, *added]):
        cells = [
            _cell([row for row in [*rows, *added] if row.key == key and row.outcome == outcome]) for outcome in OUTCOMES
        ]
        lines.append(f"| `{'+' if key in new else ''}{key}` | {' | '.join(cells)} |")
    return lines


def _cell(rows: list[Row], longest: int = 6) -> str:
    values = [str(row.value) if isinstance(row.value, str) else repr(row.value) for row in rows]
    rest = f" and {len(values) - longest} more" if len(values) > longest else ""
    return ", ".join(f"`{value}`" for value in values[:longest]) + rest


def main() -> int:
    """Write the table, or with ``--check`` say whether it is current."""
    text = document(results())
    if "--check" in sys.argv[1:]:
        current = TABLE.exists() and TABLE.read_text() == text
        if not current:
            print("docs/precision-keys.md is stale: run scripts/precision_keys.py", file=sys.stderr)
        return 0 if current else 1
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
