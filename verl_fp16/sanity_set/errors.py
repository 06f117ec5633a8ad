"""What can be wrong with a sanity set's inputs."""

from __future__ import annotations


class SanitySetError(ValueError):
    """An input cannot be used: one line that names the thing and the fix."""
