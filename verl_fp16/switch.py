"""The switch ``VERL_FP16_DISABLE``. In a module of its own, because importing the plugin puts the hooks in place."""

from __future__ import annotations

import os

DISABLE_VAR = "VERL_FP16_DISABLE"


def disabled() -> bool:
    """Whether ``VERL_FP16_DISABLE=1`` is set: then nothing is applied and the flag is an error."""
    return os.environ.get(DISABLE_VAR, "").strip().lower() in ("1", "true", "yes", "on")
