"""Models that do not fit float16, and settings of the model that say a dtype where nothing reads it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from verl_fp16.findings import Finding
from verl_fp16.guard.case import MODELS, PRECISION_WORDS, Case

# vLLM 0.28.0, for where vLLM's own list cannot be read.
REFUSED_IN_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
_VLLM_FILES = ("config/model.py", "config/__init__.py", "config.py")
_VLLM_LIST = "_FLOAT16_NOT_SUPPORTED_MODELS"


@functools.cache
def refused_in_float16() -> frozenset[str]:
    """Model types that the installed vLLM refuses in float16, from its source, without importing it."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for name in _VLLM_FILES:
            found = _keys_of(Path(folder) / name)
            if found is not None:
                return found
    return REFUSED_IN_FLOAT16


def _keys_of(path: Path) -> frozenset[str] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    if _VLLM_LIST not in text:
        return None
    for node in ast.parse(text).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == _VLLM_LIST for target in targets):
            if isinstance(node.value, ast.Dict):
                return frozenset(key.value for key in node.value.keys if isinstance(key, ast.Constant))
    return None


def model_config(path: str) -> dict:
    """``config.json`` of a model folder, or of a model in the local Hugging Face cache; empty if it is neither."""
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        cached = _cached_config(path)
        if cached is None:
            return {}
        file = Path(cached)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _cached_config(repository: str) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:  # a path, not the name of a repository
        return None
    return found if isinstance(found, str) else None


def float16_fits(case: Case) -> Iterator[Finding]:
    """vLLM refuses float16 for models whose activations pass 65,504; the trainer would overflow."""
    for key, dtypes in ((MODELS[0], (case.train, case.rollout)), (MODELS[1], (case.train,))):
        path = case.get(f"{key}.hf_config_path", None) or case.get(f"{key}.path", None)
        if "float16" not in dtypes or not isinstance(path, str):
            continue
        kind = model_config(path).get("model_type")
        if kind is not None and kind in refused_in_float16():
            why = f"a model of the type {kind}, whose activations overflow float16: vLLM refuses it in float16"
            yield Finding("error", f"{key}.path", path, why, advice="use +precision=bf16 or fp32, or another model")


def quantized_model(case: Case) -> Iterator[Finding]:
    """A checkpoint that says it is quantized is loaded so by vLLM, whatever ``--dtype`` says."""
    for model in MODELS:
        path = case.get(f"{model}.hf_config_path", None) or case.get(f"{model}.path", None)
        if isinstance(path, str) and (found := model_config(path).get("quantization_config")):
            method = found.get("quant_method", "?") if isinstance(found, dict) else found
            why = f"the model is quantized ({method}), which the flag's declaration does not cover"
            yield Finding("error", f"{model}.path", path, why, advice="use a checkpoint that is not quantized")


def inert_dtypes(case: Case) -> Iterator[Finding]:
    """``override_config`` changes the Hugging Face configuration; ``from_pretrained`` is given the dtype beside it."""
    for model in MODELS:
        key = f"{model}.override_config"
        for name, value in _leaves(case.children(key)):
            if PRECISION_WORDS.search(name):
                why = "verl does not take the dtype from here: the weights are float32, the flag declares the rest"
                yield Finding("error", f"{key}.{name}", value, why, (f"~{key}.{name}",))
        key = f"{model}.lora.dtype"
        value = case.get(key, None)
        if value is not None:
            why = "only Megatron's LoRA reads this key; FSDP's adapters are float32 master weights"
            yield Finding("error", key, value, why, (f"{key}=null",))


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def other_kernels(case: Case) -> Iterator[Finding]:
    """Kernels on the training side alone, which nobody has run in float16 with this package."""
    for model in MODELS:
        key = f"{model}.use_liger"
        value = case.get(key, False)
        if value is not False:
            why = "kernels for training only, which change its log-probs; not run in float16 with this package"
            yield Finding("warning", key, value, why, (f"{key}=false",))


FUSED = f"{MODELS[0]}.use_fused_kernels"
BACKEND = f"{MODELS[0]}.fused_kernel_options.impl_backend"
_ONE_BACKEND_RUN = "of verl's fused kernels only those of torch were run in float16 with this package"


def fused_kernels(case: Case) -> Iterator[Finding]:
    """``use_fused_kernels``: log-probs and entropy straight from the last hidden states, without keeping the logits.

    verl's torch backend computes them in float32 from float16 logits, as the usual way does; its triton backend keeps
    the logits in float32 too, and hands gradients on in float16 (``verl/utils/kernel``).
    """
    key = "actor_rollout_ref.actor.use_fused_kernels"
    value = case.get(key, False)
    if value != case.get(FUSED, False):
        why = "verl reads actor_rollout_ref.model.use_fused_kernels, not this key"
        yield Finding("warning", key, value, why, (f"{key}={str(not value).lower()}",))
    key = f"{MODELS[1]}.use_fused_kernels"
    value = case.get(key, False)
    if value is not False:
        why = "fused kernels compute log-probs from a language model's head, and a critic has none"
        yield Finding("error", key, value, why, (f"{key}=false",))
    value = case.get(FUSED, False)
    if value is True:
        yield from _fused_backend(case)
        yield from _fused_with(case)
    elif value is not False:
        yield Finding("error", FUSED, value, "must be true or false", (f"{FUSED}=false",))


def _fused_backend(case: Case) -> Iterator[Finding]:
    backend = case.get(BACKEND, None)
    fix = (case.set_to(BACKEND, "torch"),)
    if backend == "triton":
        why = f"{_ONE_BACKEND_RUN}: triton's need a GPU, and none was there"
        yield Finding("warning", BACKEND, backend, why, fix)
    elif backend == "liger" and not case.verl.startswith(("0.8.", "0.9.0")):
        why = f"{_ONE_BACKEND_RUN}; and without the package liger_kernel verl runs torch's and does not say so"
        yield Finding("warning", BACKEND, backend, why, fix)
    elif backend != "torch":
        why = f"verl {case.verl} has no such backend: it would leave the model as it is and fail at the first log-probs"
        yield Finding("error", BACKEND, backend, why, fix)


def _fused_with(case: Case) -> Iterator[Finding]:
    """Where the first log-probs fail, in any dtype: a head that is sharded by itself, and padded batches in 0.8.0."""
    fix = (f"{FUSED}=false",)
    path = case.get(f"{MODELS[0]}.hf_config_path", None) or case.get(f"{MODELS[0]}.path", None)
    has_head = isinstance(path, str) and model_config(path).get("tie_word_embeddings") is False
    if has_head and any(case.get(f"{r.section}.strategy") == "fsdp2" for r in case.roles if r.name != "critic"):
        why = (
            "the model has a head of its own (tie_word_embeddings is false), which FSDP2 shards by itself: fused "
            "kernels would multiply with its shard, and torch raises an error"
        )
        yield Finding("error", FUSED, True, why, fix, "or strategy=fsdp")
    if case.verl.startswith("0.8.") and case.get(f"{MODELS[0]}.use_remove_padding", True) is False:
        why = f"verl {case.verl} cannot take fused log-probs out of padded batches: the workers would stop"
        yield Finding("error", FUSED, True, why, fix, f"or {MODELS[0]}.use_remove_padding=true")


RULES = (float16_fits, quantized_model, inert_dtypes, other_kernels, fused_kernels)
