"""Hooks on the FSDP engine's checkpoints: the loss scaler's state goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_fp16.hooks.engine import watch_of
from verl_fp16.scaler_checkpoint import load_scaler, save_scaler


def save_with_loss_scale(original: Callable[..., None]) -> Callable[..., None]:
    def save_checkpoint(self: Any, local_path: str | None, *args: Any, **kwargs: Any) -> None:
        original(self, local_path, *args, **kwargs)
        watch = watch_of(self)
        # With what else a resumed run needs to go on alike: schedule and random numbers.
        if watch is not None and local_path is not None and self.checkpoint_manager.should_save_extra:
            save_scaler(watch.scaler, local_path)

    return save_checkpoint


def load_with_loss_scale(original: Callable[..., None]) -> Callable[..., None]:
    def load_checkpoint(self: Any, local_path: str | None, *args: Any, **kwargs: Any) -> None:
        original(self, local_path, *args, **kwargs)
        watch = watch_of(self)
        if watch is not None and local_path is not None and self.checkpoint_manager.should_load_extra:
            load_scaler(watch.scaler, local_path)
            watch.start_counting()

    return load_checkpoint
