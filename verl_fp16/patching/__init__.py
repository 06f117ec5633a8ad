"""Monkey-patching as data: declare a hook, put it in place after import, prove that it fits, take it out again.

This package knows no verl. :mod:`~verl_fp16.patching.records` is what is declared, :mod:`~verl_fp16.patching.patcher`
puts a tuple of hooks into a process, wholly or not at all. Beneath it: :mod:`~verl_fp16.patching.chain` (wraps on one
attribute, in any order of coming and going), :mod:`~verl_fp16.patching.importing` (telling when a module has been
imported), :mod:`~verl_fp16.patching.fingerprint` (whether a body is the known one) and
:mod:`~verl_fp16.patching.static` (the same checks on source files, importing nothing).
"""

from verl_fp16.patching.patcher import Patcher
from verl_fp16.patching.records import Hook, Package, PatchError, Target, import_object

__all__ = ["Hook", "Package", "PatchError", "Patcher", "Target", "import_object"]
