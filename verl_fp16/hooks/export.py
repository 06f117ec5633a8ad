"""Hooks on verl's Hugging Face exports: of the FSDP engine's checkpoints, and of the model merger.

In an engine they act where its role's payload declares another export than verl's own, see
:meth:`verl_fp16.export.Export.of_role`. The merger has no configuration of a run: there the mark beside the shards
decides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16.export import (
    MARK,
    VERLS_OWN,
    Export,
    ExportError,
    InDtype,
    KeepPrecision,
    WeightOverflow,
    read_mark,
    read_tag,
    write_mark,
    write_tag,
)
from verl_fp16.hooks.engine import settings_of
from verl_fp16.ranks import of_all_ranks, rank_and_world_size
from verl_fp16.telling import tell

_MODEL_FOLDER = "huggingface"  # verl's name, in the checkpoint's folder of a role


@dataclass
class _Saving:
    """A checkpoint that is being written by an engine whose role is exported in the declared dtype."""

    export: Export
    who: str
    cast: bool = False
    failure: Exception | None = None


class _ExportAbandoned(Exception):
    """Takes every rank out of verl's saving of the Hugging Face model, which comes after everything else."""


_saving: ContextVar[_Saving | None] = ContextVar("verl_fp16_saving", default=None)


def export_in_declared_dtype(original: Callable[..., None]) -> Callable[..., None]:
    def save_checkpoint(self: Any, local_path: str | None, *args: Any, **kwargs: Any) -> None:
        settings = settings_of(self)
        export = Export.of_role(settings) if settings is not None else None
        if export is None or local_path is None:
            return original(self, local_path, *args, **kwargs)
        saving = _Saving(export, f"{settings['role']}, {local_path}")
        token = _saving.set(saving)
        try:
            original(self, local_path, *args, **kwargs)
        finally:
            _saving.reset(token)
        if self.checkpoint_manager.should_save_hf_model and not (saving.cast or saving.failure):
            raise ExportError(f"{saving.who}: verl exported weights that did not pass through verl_fp16's hook")
        if rank_and_world_size()[0] == 0:
            write_tag(Path(local_path) / _MODEL_FOLDER, export.dtype)
            write_mark(local_path, export)
        if saving.failure is not None:
            raise saving.failure

    return save_checkpoint


def keep_checkpoint_without_export(original: Callable[..., None]) -> Callable[..., None]:
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except _ExportAbandoned:
            # Raised by export_in_declared_dtype, when the engine and the other hooks have done their part.
            pass

    return save_checkpoint


def gather_in_declared_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_fsdp_full_state_dict(*args: Any, **kwargs: Any) -> Any:
        state_dict = original(*args, **kwargs)
        saving = _saving.get()
        if saving is not None:
            _cast_for_all_ranks(state_dict, saving)
        return state_dict

    return get_fsdp_full_state_dict


def _cast_for_all_ranks(state_dict: dict[str, Any], saving: _Saving) -> None:
    """Cast what this rank gathered (rank 0 everything, the others nothing).

    Raises:
        _ExportAbandoned: on every rank, if it failed on one: the others would wait for that one in a barrier.
    """
    failure = passed = None
    try:
        passed = saving.export.cast(state_dict)
    except WeightOverflow as error:
        failure = WeightOverflow(
            f"{saving.who}: nothing was written for hf_model: {error}. The setting is verl_fp16.sync.on_overflow. The "
            "checkpoint itself is complete"
        )
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
        failure = ExportError(f"{saving.who}: nothing was written for hf_model: {type(error).__name__}: {error}")
    saving.failure = next(filter(None, of_all_ranks(failure)), None)
    if saving.failure is not None:
        raise _ExportAbandoned
    saving.cast = True
    if passed:
        tell(f"{saving.who}: {passed}")


def merge_in_declared_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_and_merge_state_dicts(self: Any, *args: Any, **kwargs: Any) -> Any:
        export = _export_of_checkpoint(self, say=tell)
        if export is None:
            return original(self, *args, **kwargs)
        folder = self.config.local_dir
        with KeepPrecision():
            state_dict = original(self, *args, **kwargs)
        try:
            passed = export.cast(state_dict)
        except WeightOverflow as error:
            way_out = f"on_overflow is in {Path(folder) / MARK}; without that file verl merges in {VERLS_OWN}"
            raise WeightOverflow(f"{folder}: nothing was merged: {error}. {way_out}") from None
        tell(f"{folder} is merged in {export.dtype}, as {MARK} says" + (f": {passed}" if passed else ""))
        return state_dict

    return _load_and_merge_state_dicts


def make_models_in_declared_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_transformers_auto_model_class(self: Any) -> Any:
        auto_class = original(self)
        export = _export_of_checkpoint(self)
        return auto_class if export is None else InDtype(auto_class, export.torch_dtype)

    return get_transformers_auto_model_class


def _export_of_checkpoint(merger: Any, say: Callable[[str], object] = lambda said: None) -> Export | None:
    """What the mark in the merger's checkpoint says, unless somebody has tagged the model otherwise since.

    Raises:
        ExportError: the mark cannot be read.
    """
    folder = getattr(getattr(merger, "config", None), "local_dir", None)
    export = read_mark(folder) if folder is not None else None
    if export is None:
        return None
    tag = read_tag(merger.config.hf_model_config_path)
    if tag != export.dtype:
        say(f"{folder}: {MARK} says {export.dtype}, {_MODEL_FOLDER}/config.json {tag}: verl goes on in {VERLS_OWN}")
        return None
    return export
