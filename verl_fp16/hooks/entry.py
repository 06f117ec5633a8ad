"""The hook on what each of verl's entry points does first. The check itself is imported when a program starts one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_before_start(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``auto_set_device`` is the first thing that each of verl's entry points does with its configuration."""

    def auto_set_device(config: Any) -> None:
        from verl_fp16.hooks import driver

        original(config)
        driver.check_before_start(config)

    return auto_set_device
