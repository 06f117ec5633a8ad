"""Tells when a module has been imported, before any ``from module import name`` of it can run."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Callable, Container
from types import ModuleType
from typing import Any


def is_importing(module: ModuleType) -> bool:
    """Whether the module's body is still running."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class PostImportFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the modules ``names`` and calls ``imported(module)`` when one has been executed.

    An error that ``imported`` raises comes out of that import.
    """

    def __init__(self, names: Container[str], imported: Callable[[ModuleType], None]):
        self._names = names
        self._imported = imported
        self._searching = threading.local()

    def install(self) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname not in self._names or getattr(self._searching, "active", False):
            return None
        self._searching.active = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.active = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = _NotifyingLoader(spec.loader, self._imported)
        return spec


class _NotifyingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any, imported: Callable[[ModuleType], None]):
        self._loader = loader
        self._imported = imported

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._imported(module)
