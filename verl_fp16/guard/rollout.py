"""vLLM computes in what the flag declares and reports log-probs that training can be compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verl_fp16.findings import Finding
from verl_fp16.guard.case import ABSENT, GENERATION, PRECISION_WORDS, ROLLOUT, VLLM_SPELLINGS, Case, dtype_of

TEACHERS = "distillation.teacher_models"
VLLM = f"{GENERATION}.engine_kwargs.vllm"
_KNOWN_DTYPES = "vLLM knows half, float16, bfloat16, float, float32"
SMALLEST_TEMPERATURE = 1e-3
MODES = ("processed_logprobs", "raw_logprobs")


def engine(case: Case) -> Iterator[Finding]:
    """``rollout.name``; verl fails by itself where it is missing."""
    key = f"{GENERATION}.name"
    value = case.get(key)
    if value in ("sglang", "trtllm"):
        why = (
            f"{value} is handed rollout.dtype too, but this package was built for vLLM and reads nothing back from "
            f"{value}: that it computes in {case.rollout} could not be proved, and the run would be stopped"
        )
        yield Finding("error", key, value, why, (f"{key}=vllm",))
    elif value == "hf":
        why = "hf_rollout generates under an autocast to bfloat16, whatever is declared, and verl registers it no more"
        yield Finding("error", key, value, why, (f"{key}=vllm",))
    elif value not in (ABSENT, "???", "vllm"):
        yield Finding("error", key, value, f"verl has no rollout {value!r}", (f"{key}=vllm",))


def dtype(case: Case) -> Iterator[Finding]:
    """``rollout.dtype`` is vLLM's ``--dtype``; without the key verl's dataclass says bfloat16."""
    key = f"{GENERATION}.dtype"
    if case.get(GENERATION) is ABSENT:
        return
    yield from _vllm_dtype(case, key, case.get(key, "bfloat16"), (case.set_to(key, case.rollout),))


def _vllm_dtype(case: Case, key: str, value: Any, fix: tuple[str, ...]) -> Iterator[Finding]:
    found = dtype_of(value, VLLM_SPELLINGS)
    if case.rollout is None or found == case.rollout:
        return
    if found is not None:
        why = f"vLLM would compute in {found} while {ROLLOUT} declares {case.rollout}: a mixed pair has the largest gap"
    elif value is None or value == "auto":
        why = f"vLLM would take its dtype from the checkpoint, while {ROLLOUT} declares {case.rollout}"
    else:
        why = f"no dtype to vLLM, whose server would stop ({_KNOWN_DTYPES})"
    yield Finding("error", key, value, why, fix, "for another pair of dtypes use another precision=...")


# Options of vLLM's that can change in which dtype it computes, though their names do not say so: config is a file with
# any options, the worker classes take the place of the one that is read back.
_OTHER_OPTIONS = (
    "hf_overrides",
    "logprobs_mode",
    "model",
    "config",
    "load_format",
    "worker_cls",
    "worker_extension_cls",
)


def engine_arguments(case: Case) -> Iterator[Finding]:
    """``rollout.engine_kwargs.vllm`` goes to vLLM's command line last, so that it wins over verl's own arguments."""
    for name, value in case.children(VLLM).items():
        key, option = f"{VLLM}.{name}", str(name).replace("-", "_")
        if value is None or not (PRECISION_WORDS.search(option) or option in _OTHER_OPTIONS or "quant" in str(value)):
            continue  # verl leaves an argument that is null out
        if option == "dtype":
            yield from _vllm_dtype(case, key, value, (f"~{key}",))
        elif option == "kv_cache_dtype":
            yield from _kv_cache(case, key, value)
        elif option == "logprobs_mode":
            yield from _mode(key, value, f"~{key}")
        elif option == "hf_overrides":
            if PRECISION_WORDS.search(str(value)):
                yield Finding("error", key, value, "it changes the dtype or quantization of vLLM's model", (f"~{key}",))
        else:
            why = "it wins over what verl tells vLLM, and the flag's declaration does not cover it"
            yield Finding("error", key, value, why, (f"~{key}",))
    for other, arguments in case.children(f"{GENERATION}.engine_kwargs").items():
        for name, value in arguments.items() if other != "vllm" and isinstance(arguments, dict) else ():
            if PRECISION_WORDS.search(str(name)):
                key = f"{GENERATION}.engine_kwargs.{other}.{name}"
                why = f"read by {other} only, which this package neither checks nor reads back"
                yield Finding("error", key, value, why, (f"~{key}",))


def _kv_cache(case: Case, key: str, value: Any) -> Iterator[Finding]:
    if value == "auto" or case.rollout is None or value == case.rollout:
        return
    why = f"keys and values would be kept in {value} while {ROLLOUT} declares {case.rollout}: attention rounds them"
    yield Finding("error", key, value, why, (f"~{key}",))


def quantization(case: Case) -> Iterator[Finding]:
    """``rollout.quantization``: fp8, torchao, ascend."""
    for name in ("quantization", "quantization_config_file"):
        key = f"{GENERATION}.{name}"
        value = case.get(key, None)
        if value is not None:
            why = f"vLLM would compute with quantized weights while {ROLLOUT} declares {case.rollout}"
            yield Finding("error", key, value, why, (f"{key}=null",))


def load_format(case: Case) -> Iterator[Finding]:
    """``rollout.load_format``: some formats bring quantized weights."""
    key = f"{GENERATION}.load_format"
    value = case.get(key, "dummy")
    if value in ("bitsandbytes", "gguf"):
        why = f"vLLM would hold quantized weights while {ROLLOUT} declares {case.rollout}"
        yield Finding("error", key, value, why, (f"{key}=dummy",))


def disaggregation(case: Case) -> Iterator[Finding]:
    """``rollout.disaggregation``: prefill and decode in servers of their own, each with its own workers."""
    key = f"{GENERATION}.disaggregation.enabled"
    if case.get(key, False) is True:
        why = "what the workers of separate prefill and decode servers run is not read back yet"
        yield Finding("error", key, True, why, (f"{key}=false",))


def log_probs(case: Case) -> Iterator[Finding]:
    """``calculate_log_probs``, off where the key is missing."""
    key = f"{GENERATION}.calculate_log_probs"
    value = case.get(key, False)
    if value is not True and case.get(GENERATION) is not ABSENT:
        why = "without the rollout's own log-probs the gap to training can be neither measured nor corrected"
        yield Finding("error", key, value, why, (case.set_to(key, "true"),))


def log_probs_mode(case: Case) -> Iterator[Finding]:
    """``logprobs_mode``: the trainer's log-probs are of the logits divided by the temperature."""
    key = f"{GENERATION}.logprobs_mode"
    value = case.get(key, "processed_logprobs")
    yield from _mode(key, value, f"{key}=processed_logprobs")


def _mode(key: str, value: Any, fix: str) -> Iterator[Finding]:
    if value == "processed_logprobs":
        return
    if value is None or value == "raw_logprobs":
        why = "raw log-probs leave the temperature out, which the trainer's have: right at temperature=1 only"
        yield Finding("warning", key, value, why, (fix,))
    else:
        why = f"the rollout would not report log-probs (known: {', '.join(MODES)})"
        yield Finding("error", key, value, why, (fix,))


def truncated_sampling(case: Case) -> Iterator[Finding]:
    """top_p and top_k: processed log-probs are of the truncated distribution, the trainer's of the whole."""
    top_p, top_k = f"{GENERATION}.top_p", f"{GENERATION}.top_k"
    why = (
        "the rollout samples from a truncated distribution, the trainer computes with the whole one: the gap and every "
        "importance ratio contain the truncation (top_p=0.8 alone puts half of the tokens out of [0.9, 1.1])"
    )
    if case.get(top_p, 1.0) != 1:
        yield Finding("warning", top_p, case.get(top_p), why, (f"{top_p}=1.0",))
    if case.get(top_k, -1) not in (-1, 0):
        yield Finding("warning", top_k, case.get(top_k), why, (f"{top_k}=-1",))


def temperature_of_raw_log_probs(case: Case) -> Iterator[Finding]:
    """temperature != 1 without processed log-probs."""
    key = f"{GENERATION}.temperature"
    value = case.get(key, 1.0)
    mode = case.get(f"{VLLM}.logprobs_mode", None) or case.get(f"{GENERATION}.logprobs_mode", "processed_logprobs")
    if value != 1 and mode != "processed_logprobs":
        why = f"with logprobs_mode={mode} only the trainer's log-probs contain the temperature: a fake gap"
        yield Finding("warning", key, value, why, (f"{GENERATION}.logprobs_mode=processed_logprobs",))


def temperature_of_float16(case: Case) -> Iterator[Finding]:
    """Training divides FP16 logits by the temperature, clamped at 1e-8 (``_scale_logits_by_temperature``)."""
    key = f"{GENERATION}.temperature"
    value = case.get(key, 1.0)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if case.train == "float16" and is_number and value < SMALLEST_TEMPERATURE:
        why = (
            "training divides its float16 logits by this: a logit of 65 passes float16's largest number, 65,504, at a "
            f"temperature below {SMALLEST_TEMPERATURE}, and verl's lower bound of 1e-8 is 0 in float16: log-probs and "
            "loss would be inf or nan"
        )
        yield Finding("error", key, value, why, (f"{key}=1.0",))


def teachers(case: Case) -> Iterator[Finding]:
    """A distillation teacher runs in vLLM too; in verl's own file its dtype follows the rollout's."""
    for name in case.children(TEACHERS) if case.get("distillation.enabled", True) is not False else ():
        key = f"{TEACHERS}.{name}.inference.dtype"
        value = case.get(key, "bfloat16")  # verl's dataclass
        if case.rollout is None or value == case.get(f"{GENERATION}.dtype"):
            continue  # it follows: what is wrong is told of the rollout
        if dtype_of(value, VLLM_SPELLINGS) != case.rollout:
            why = f"the teacher's log-probs would be computed in another dtype than the declared {case.rollout}"
            yield Finding("warning", key, value, why, (case.set_to(key, case.rollout),))


RULES = (
    engine,
    dtype,
    engine_arguments,
    quantization,
    load_format,
    disaggregation,
    log_probs,
    log_probs_mode,
    truncated_sampling,
    temperature_of_raw_log_probs,
    temperature_of_float16,
    teachers,
)
