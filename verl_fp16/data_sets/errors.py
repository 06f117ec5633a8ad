"""What can be wrong with a data set."""

from __future__ import annotations


class DataSetError(ValueError):
    """A data set cannot be used: one line that names the file or the option, and the fix."""
