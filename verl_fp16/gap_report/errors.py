"""What can be wrong with the offline measurement of the gap."""

from __future__ import annotations


class GapError(ValueError):
    """It cannot go on: one line that names the thing and the fix."""
