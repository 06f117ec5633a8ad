"""How this package speaks to the user from any process of a run."""

from __future__ import annotations

import sys


def tell(said: str) -> None:
    """One line on stderr. Not through logging: the root logger of verl's workers is set to ERROR on the way."""
    print(f"verl_fp16: {said}", file=sys.stderr, flush=True)
