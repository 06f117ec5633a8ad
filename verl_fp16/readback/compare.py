"""Declaration against reports: who runs what else than was declared. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verl_fp16.settings import Settings

TRAINING_FIELDS: dict[str, str] = {
    "autocast": "dtype of autocast in the engine's forward",
    "fsdp_param": "dtype of the parameters that FSDP gathers",
    "fsdp_reduce": "dtype of FSDP's gradient reduction",
    "fsdp_buffer": "dtype of FSDP1's buffers; empty with FSDP2, which leaves them as they are",
    "parameters": "dtype of the parameters as they are stored",
    "master": "dtype of the parameters that the optimizer updates; None without an optimizer",
    "scaler": "class of the loss scaler, or None",
    "scaler_enabled": "whether it scales",
    "scaler_device": "where it looks for overflow",
    "scaler_settings": "its settings",
    "scale": "its scale now",
    "stuck": "whether it skips every update and cannot go lower",
    "last_skip": "the newest skipped update, see verl_fp16.skip_records; None without one",
    "last_skip_line": "the same in one line",
    "attention": "attention implementation of the model",
    "device": "where the parameters are",
    "engine": "class of verl's engine",
    "fsdp": "FSDP1 or FSDP2",
}
ROLLOUT_FIELDS: dict[str, str] = {
    "model_dtype": "dtype of vLLM's model",
    "parameters": "dtypes of the loaded parameters",
    "kv_cache": "dtype of the KV cache's tensors",
    "kv_cache_setting": "what vLLM's cache configuration says",
    "model": "class of vLLM's model",
    "device": "where the parameters are",
}

# Declared by nothing, but the ranks of a role must have them in common.
_IN_COMMON = ("engine", "fsdp", "attention", "scale", "device", "scaler_device", "model", "kv_cache_setting")
_LISTED = 12


class ReadBackError(RuntimeError):
    """What runs is not what was declared, or a process did not say what it runs."""


@dataclass(frozen=True)
class Answer:
    """What one process that was asked said, or why it said nothing.

    Args:
        who: the process in words: ``training worker 1``, ``rollout replica 0, worker 0``.
        roles: the roles it has to report.
        report: see :mod:`verl_fp16.readback.rank`; None when there is none.
        failure: why there is none.
        where: host and pid, as far as they are known without a report.
    """

    who: str
    roles: tuple[str, ...] = ()
    report: Mapping[str, Any] | None = None
    failure: str = ""
    where: str = ""

    def place(self) -> str:
        """Host and pid of the process."""
        return f"host {self.report['host']}, pid {self.report['pid']}" if self.report else self.where

    def name(self, role: str = "") -> str:
        """The process, or one role in it, in words: with role, rank, host and pid."""
        rank = self.report.get("rank") if self.report else None
        what = self.who if rank is None else f"{role or '/'.join(self.roles) or self.who} rank {rank}"
        # The global rank of a vLLM worker counts within its replica.
        prefix = f"{self.who}: " if role == "rollout" and rank is not None else ""
        return f"{prefix}{what} ({self.place() or 'where it runs is not known'})"


@dataclass(frozen=True)
class Difference:
    """One thing that is not as declared.

    Args:
        who: the process, or the role in it, with rank, host and pid.
        what: a field, a hook or a version; empty where the process did not report.
        found: what runs.
        declared: what should.
    """

    who: str
    what: str
    found: Any
    declared: Any

    def __str__(self) -> str:
        if not self.what:
            return f"{self.who} did not report: {self.found}"
        return f"{self.who}: {self.what} is {_text(self.found)}, {_text(self.declared)}"


def declared_fields(settings: Settings, role: str) -> dict[str, Any]:
    """Field -> what the declaration demands of ``role`` (actor, ref or critic)."""
    scale = {"actor": settings.loss_scale, "critic": settings.critic_loss_scale}.get(role)
    scaled = scale is not None and settings.train_dtype == "float16"
    return {
        "autocast": settings.train_dtype,
        "fsdp_param": [settings.train_dtype],
        "fsdp_reduce": ["float32"],
        "parameters": ["float32"],
        "master": None if role == "ref" else ["float32"],
        "scaler": "LossScaler" if scaled else None,
        "scaler_enabled": True if scaled else None,
        "scaler_settings": asdict(scale) if scaled else None,
    }


def dtypes_in_force(answers: Iterable[Answer]) -> dict[str, list[str]]:
    """``train`` and ``rollout`` -> the dtypes that the ranks of actor and rollout compute in."""
    fields = {"actor": ("train", "autocast"), "rollout": ("rollout", "model_dtype")}
    found: dict[str, set[str]] = {}
    for answer in answers:
        for role, reported in (answer.report or {}).get("roles", {}).items():
            if role in fields:
                side, field = fields[role]
                found.setdefault(side, set()).add(str(reported[field]))
    return {side: sorted(dtypes) for side, dtypes in found.items()}


def differences(settings: Settings, answers: Sequence[Answer]) -> list[Difference]:
    """Everything that is not as declared, in the order of ``answers``, whose first one is the trainer's own process."""
    found: list[Difference] = []
    for answer in answers:
        if answer.report is None:
            found.append(Difference(answer.name(), "", answer.failure, None))
            continue
        found += _process_differences(answer, answers[0])
        reported = answer.report["roles"]
        for role in answer.roles:
            if role not in reported:
                found.append(Difference(answer.name(role), "", f"it has no engine of the role {role}", None))
        for role, fields in reported.items():
            judge = _rollout_differences if role == "rollout" else _training_differences
            found += judge(settings, answer, role, fields)
    return [*found, *_mixed(answers)]


def _process_differences(answer: Answer, trainer: Answer) -> Iterable[Difference]:
    who = answer.name()
    for name, status in answer.report["hooks"].items():
        if status.startswith(("refused", "withdrawn")):
            yield Difference(who, f"hook {name}", status, "declared applied")
        elif (
            status == "pending"
            and name.startswith(("engine.", "worker."))
            and set(answer.report["roles"]) - {"rollout"}
        ):
            yield Difference(who, f"hook {name}", "not in place although the engine is", "declared applied")
    if trainer.report is not None:
        for name, version in answer.report["versions"].items():
            wanted = trainer.report["versions"].get(name)
            if version != wanted:
                yield Difference(who, f"version of {name}", version, f"the trainer's is {wanted}")


def _training_differences(
    settings: Settings, answer: Answer, role: str, fields: Mapping[str, Any]
) -> Iterable[Difference]:
    declared = declared_fields(settings, role)
    another_scaler = fields.get("scaler") != declared["scaler"]
    for field, wanted in declared.items():
        if field.startswith("scaler_") and another_scaler:
            continue  # said already by its class
        if fields.get(field) != wanted:
            yield Difference(answer.name(role), field, fields.get(field), f"declared {_text(wanted)}")
    if fields.get("fsdp_buffer") not in ([], ["float32"]):
        yield Difference(answer.name(role), "fsdp_buffer", fields.get("fsdp_buffer"), "declared float32")


def _rollout_differences(
    settings: Settings, answer: Answer, role: str, fields: Mapping[str, Any]
) -> Iterable[Difference]:
    dtype, who = settings.rollout_dtype, answer.name(role)
    if fields["model_dtype"] != dtype:
        yield Difference(who, "model_dtype", fields["model_dtype"], f"declared {dtype}")
    # vLLM keeps some small parameters (router biases) in float32 on purpose; any other dtype is a quantized model's.
    if dtype not in fields["parameters"] or not set(fields["parameters"]) <= {dtype, "float32"}:
        yield Difference(who, "parameters", fields["parameters"], f"declared {dtype}")
    if fields["kv_cache"] not in ([], [dtype]):
        yield Difference(who, "kv_cache", fields["kv_cache"], f"declared {dtype}")


def _mixed(answers: Sequence[Answer]) -> Iterable[Difference]:
    """Ranks of one role that differ in what they must have in common, against the first rank that reported."""
    first: dict[str, tuple[Answer, Mapping[str, Any]]] = {}
    for answer in answers:
        for role, fields in (answer.report or {}).get("roles", {}).items():
            reference, wanted = first.setdefault(role, (answer, fields))
            for field in _IN_COMMON:
                if field in ("scale", "scaler_device") and fields.get("scaler") != wanted.get("scaler"):
                    continue  # said already by its class
                if fields.get(field) != wanted.get(field):
                    there = f"{_text(wanted.get(field))} on {reference.name(role)}"
                    yield Difference(answer.name(role), field, fields.get(field), f"but {there}")


def raise_if_any(settings: Settings, found: Sequence[Difference], file: str) -> None:
    """Stop the run where there is a difference.

    Args:
        file: where the whole read-back was written.

    Raises:
        ReadBackError: on one line, with who and what; of many differences the first twelve.
    """
    if not found:
        return
    listed = "; ".join(str(difference) for difference in found[:_LISTED])
    more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    raise ReadBackError(
        f"what runs is not what was declared (training {settings.train_dtype}, rollout {settings.rollout_dtype}). "
        f"{listed}{more}. Nothing was trained. All answers: {file}"
    )


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
