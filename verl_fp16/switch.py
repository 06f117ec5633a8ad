"""Whether the plugins are loaded and on. In a module of its own, because importing a plugin puts hooks in place."""

from __future__ import annotations

import os

DISABLE_VAR = "VERL_FP16_DISABLE"


def how_to_load(entry_point: str, module: str) -> str:
    """What to check where verl has not loaded one of this package's plugins.

    Args:
        entry_point: its name in the group ``verl.plugins``.
        module: the module behind it.
    """
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "(unset)")
    return (
        f"Check VERL_USE_EXTERNAL_PLUGINS={policy}: must be unset, 'auto', or name {entry_point}. On a verl below 0.9 "
        f"set VERL_USE_EXTERNAL_MODULES={module}"
    )


def disabled() -> bool:
    """Whether ``VERL_FP16_DISABLE=1`` is set: then nothing is applied and the flag is an error.

    Any value but an empty one and 0, false, no, off counts: with an unknown word, the safe side is the one that says
    something.
    """
    return os.environ.get(DISABLE_VAR, "").strip().lower() not in ("", "0", "false", "no", "off")
