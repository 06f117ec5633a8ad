"""The switch ``VERL_FP16_DISABLE``. In a module of its own, because importing the plugin puts the hooks in place."""

from __future__ import annotations

import os

DISABLE_VAR = "VERL_FP16_DISABLE"


def disabled() -> bool:
    """Whether ``VERL_FP16_DISABLE=1`` is set: then nothing is applied and the flag is an error.

    Any value but an empty one and 0, false, no, off counts: with an unknown word, the safe side is the one that says
    something.
    """
    return os.environ.get(DISABLE_VAR, "").strip().lower() not in ("", "0", "false", "no", "off")
