"""Actor, reference policy and critic compute in what the flag declares, and carry what our hooks need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

from verl_fp16.fault_injection import ALLOW_VAR, allowed
from verl_fp16.findings import Finding, written
from verl_fp16.guard.algorithm import BYPASS
from verl_fp16.guard.case import (
    ABSENT,
    FSDP_SPELLINGS,
    GENERATION,
    MODELS,
    NODE,
    PRECISION_WORDS,
    TRAIN,
    Case,
    Role,
    dtype_of,
)
from verl_fp16.loss_scale_settings import DYNAMIC_FIELDS
from verl_fp16.settings import SCALES, LossScaleSettings, Settings

# The run's folder.
FOLDER = "trainer.default_local_dir"

_KNOWN_DTYPES = "verl knows fp16, float16, bf16, bfloat16, fp32, float32"


def payload(role: str, settings: Settings, folder: str | None = None, bypass_mode: bool = False) -> dict[str, Any]:
    """What rides to the workers of ``role`` in its ``mixed_precision.verl_fp16``.

    Args:
        folder: the run's, ``trainer.default_local_dir``.
        bypass_mode: whether the rollout's log-probabilities are taken for those of the old policy.
    """
    scales = {"actor": settings.loss_scale, "critic": settings.critic_loss_scale, "ref": None}
    scale = scales[role]
    faults = [asdict(fault) for fault in settings.fault_injection if fault.role == role]
    return {
        "role": role,
        "dtype": settings.train_dtype,
        "loss_scale": asdict(scale) if scale is not None else None,
        "folder": folder,
        "bypass_mode": bypass_mode and role == "actor",
        "fault_injection": [{**fault, "updates": list(fault["updates"])} for fault in faults],
        # The critic goes nowhere but into checkpoints and exports, in the dtype that it computes in.
        "weight_sync": {
            "dtype": settings.rollout_dtype if role == "actor" else settings.train_dtype,
            **asdict(settings.sync),
        },
    }


def mixed_precision(case: Case) -> Iterator[Finding]:
    """The three keys that ``FSDPEngine._build_fsdp_module`` reads, and that there are no others but ours."""
    for role in case.fsdp_roles:
        if role not in case.roles:
            yield _cut_off(role, role.engine, case.get(role.engine))
            continue
        key = f"{role.engine}.mixed_precision"
        mixed = case.get(key)
        if not isinstance(mixed, Mapping) or mixed.get(NODE) is None:
            what = f"{key}.{NODE}" if isinstance(mixed, Mapping) else key
            yield _cut_off(role, what, case.get(what))
        if isinstance(mixed, Mapping):
            yield from _compute_dtype(case, role, f"{key}.param_dtype")
            for name in ("reduce_dtype", "buffer_dtype"):
                yield from _kept_in_float32(case, f"{key}.{name}")
            yield from _unread(mixed, key, ("param_dtype", "reduce_dtype", "buffer_dtype", NODE))


def _cut_off(role: Role, key: str, value: Any) -> Finding:
    why = (
        f"it was removed by an override: the {role.name} would train without this package's loss scaler, or in another "
        "dtype than declared"
    )
    return Finding("error", key, value, why, advice="drop the override; for other dtypes use another precision=...")


def _compute_dtype(case: Case, role: Role, key: str) -> Iterator[Finding]:
    value = case.get(key)
    found = dtype_of("bf16" if value is ABSENT else value, FSDP_SPELLINGS)  # verl's default where the key is missing
    if case.train is None or found == case.train:
        return
    why = (
        f"the {role.name} would compute in {found} while {TRAIN} declares {case.train}: roles in different dtypes give "
        "the same token different probabilities"
        if found is not None
        else f"no dtype to verl, whose workers would stop ({_KNOWN_DTYPES})"
    )
    advice = "for another pair of dtypes use another precision=..."
    yield Finding("error", key, value, why, (case.set_to(key, case.train),), advice)


def _kept_in_float32(case: Case, key: str) -> Iterator[Finding]:
    value = case.get(key)
    if value is ABSENT or dtype_of(value, FSDP_SPELLINGS) == "float32":  # fp32 is verl's default
        return
    known = dtype_of(value, FSDP_SPELLINGS) is not None
    why = (
        "the flag declares float32: summed over ranks in float16, gradients of a scaled loss pass 65,504, and bfloat16 "
        "keeps 8 of their bits"
        if known
        else f"no dtype to verl, whose workers would stop ({_KNOWN_DTYPES})"
    )
    yield Finding("error", key, value, why, (f"{key}=fp32",))


def _unread(node: Mapping[str, Any], key: str, known: tuple[str, ...]) -> Iterator[Finding]:
    for name, value in node.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = (
                f"did you mean {key}.{near[0]}?" if near else f"verl reads {', '.join(k for k in known if k != NODE)}"
            )
            why = f"verl accepts this key and reads it nowhere ({hint})"
            yield Finding("error", f"{key}.{name}", value, why, (f"~{key}.{name}",))


def payloads(case: Case) -> Iterator[Finding]:
    """What our hooks read in a worker is what the driver's settings say."""
    if case.settings is None:
        return
    for role in case.roles:
        key = f"{role.engine}.mixed_precision.{NODE}"
        found = case.get(key, None)
        if found is None or found == payload(
            role.name, case.settings, case.get(FOLDER, None), case.get(BYPASS, False) is True
        ):
            continue
        source = f"{NODE}.{'critic_' if role.name == 'critic' else ''}loss_scale"
        why = f"it differs from the node {NODE}, from which it is made: the {role.name} would not do what is declared"
        yield Finding("error", key, found, why, (f"{key}=${{{NODE}:{role.name}}}",), f"set {source} or {TRAIN} instead")


def idle_scaler(case: Case) -> Iterator[Finding]:
    """Settings of a loss scaler where there is none: only float16 training has one."""
    if case.settings is None or case.train in (None, "float16"):
        return
    for name in SCALES:
        for field in fields(LossScaleSettings):
            key, value = f"{NODE}.{name}.{field.name}", getattr(getattr(case.settings, name), field.name)
            if value != field.default:
                why = f"training in {case.train} has no loss scaler: nothing reads this setting"
                yield Finding("warning", key, value, why, (f"{key}={written(field.default)}",))


def static_scale(case: Case) -> Iterator[Finding]:
    """Settings that move the scale, where it is static."""
    if case.settings is None or case.train != "float16":
        return
    for name in SCALES:
        settings = getattr(case.settings, name)
        if settings.mode != "static":
            continue
        for field in fields(LossScaleSettings):
            key, value = f"{NODE}.{name}.{field.name}", getattr(settings, field.name)
            # The critic's follow those of an actor that reads them.
            followed = name != SCALES[0] and value == getattr(case.settings.loss_scale, field.name)
            if field.name in DYNAMIC_FIELDS and value != field.default and not followed:
                why = f"with {NODE}.{name}.mode=static the scale stays at init: nothing reads this setting"
                yield Finding("warning", key, value, why, (f"{key}={written(field.default)}",), "or mode=dynamic")


def planted_faults(case: Case) -> Iterator[Finding]:
    """Faults are for tests and drills: never by accident, and never where nothing would plant them."""
    if case.settings is None or not case.settings.fault_injection:
        return
    key = f"{NODE}.fault_injection"
    if not allowed():
        why = "faults would be planted in this run: they are for tests and drills"
        yield Finding("error", key, "...", why, (f"{key}=[]",), f"or set {ALLOW_VAR}=1 where the run is launched")
    elif case.train != "float16":
        why = f"training in {case.train} has no loss scaler, around which faults are planted"
        yield Finding("error", key, "...", why, (f"{key}=[]",))
    ranks = case.get("trainer.nnodes", 1), case.get("trainer.n_gpus_per_node", None)
    world_size = ranks[0] * ranks[1] if all(isinstance(number, int) for number in ranks) else None
    for index, fault in enumerate(case.settings.fault_injection):
        if fault.role == "critic" and not case.has_critic:
            why = "this run has no critic: nothing would be planted"
            yield Finding("error", f"{key}[{index}].role", fault.role, why, (f"{key}=[]",))
        if world_size is not None and fault.rank >= world_size:
            why = f"this run has ranks 0 to {world_size - 1}: nothing would be planted"
            yield Finding("error", f"{key}[{index}].rank", fault.rank, why, (f"{key}=[]",))


def idle_critic_scale(case: Case) -> Iterator[Finding]:
    """Settings of the critic's scaler in a run without a critic."""
    if case.settings is None or case.train != "float16" or case.has_critic:
        return
    for field in fields(LossScaleSettings):
        key, value = f"{NODE}.critic_loss_scale.{field.name}", getattr(case.settings.critic_loss_scale, field.name)
        actors = getattr(case.settings.loss_scale, field.name)
        if value != actors:
            fix = (f"{key}=${{{NODE}.loss_scale.{field.name}}}",)
            yield Finding("warning", key, value, "this run has no critic: nothing reads this setting", fix)


def master_weights(case: Case) -> Iterator[Finding]:
    """``model_dtype`` is the dtype of the master weights (``FSDPEngine._build_module``); verl's default is fp32."""
    for role in case.roles:
        key = f"{role.engine}.model_dtype"
        value = case.get(key, "fp32")
        if dtype_of(value, FSDP_SPELLINGS) == "float32":
            continue
        why = (
            f"the {role.name}'s weights would be held in less than float32: an update smaller than their last bit is "
            "lost, and AdamW's eps of 1e-8 is 0 in float16"
            if dtype_of(value, FSDP_SPELLINGS) or value is None
            else f"no dtype to verl, whose workers would stop ({_KNOWN_DTYPES})"
        )
        yield Finding("error", key, value, why, (f"{key}=fp32",))


def dead_dtype(case: Case) -> Iterator[Finding]:
    """``fsdp_config.dtype``, verl's documented key, which no FSDP engine reads."""
    for role in case.roles:
        key = f"{role.engine}.dtype"
        value = case.get(key)
        if case.train is None or value is ABSENT or dtype_of(value, FSDP_SPELLINGS) == case.train:
            continue
        why = (
            f"verl {case.verl} does not read this key, and accepts any value: the {role.name} computes in {case.train}"
        )
        yield Finding(
            "error", key, value, why, (f"{key}={case.train}",), "or drop the override: the flag declares the dtype"
        )


def trained_or_not(case: Case) -> Iterator[Finding]:
    """``forward_only`` leaves out optimizer and scaler, and in FSDP1 offloads the parameters."""
    for role in case.roles:
        key = f"{role.engine}.forward_only"
        value = case.get(key, False)
        if value is not role.forward_only:
            why = (
                "the reference policy would get an optimizer and a loss scaler, for which the flag declares no settings"
                if role.forward_only
                else f"the {role.name} would get neither optimizer nor loss scaler"
            )
            yield Finding("error", key, value, why, (case.set_to(key, str(role.forward_only).lower()),))


_KNOWN_OF_ENGINE = {"dtype", "model_dtype", "mixed_precision"}
_KNOWN_OF_ROLLOUT = {"dtype", "quantization", "quantization_config_file"}


def unknown_keys(case: Case) -> Iterator[Finding]:
    """Keys of nobody's with a name of precision: verl would refuse most of them, but in a worker, after Ray started."""
    places: dict[str, set[str]] = {GENERATION: _KNOWN_OF_ROLLOUT, **{model: set() for model in MODELS}}
    for role in case.roles:
        places |= {role.engine: _KNOWN_OF_ENGINE, role.section: set(), f"{role.section}.optim": set()}
    for place, known in places.items():
        for name, value in case.children(place).items():
            if PRECISION_WORDS.search(str(name)) and name not in known:
                near = get_close_matches(str(name), sorted(known), n=1)
                hint = f"did you mean {place}.{near[0]}?" if near else "the flag declares the dtypes"
                yield Finding("error", f"{place}.{name}", value, f"verl has no such key: {hint}", (f"~{place}.{name}",))


RULES = (
    mixed_precision,
    payloads,
    idle_scaler,
    static_scale,
    planted_faults,
    idle_critic_scale,
    master_weights,
    dead_dtype,
    trained_or_not,
    unknown_keys,
)
