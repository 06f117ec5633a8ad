#!/usr/bin/env python3
"""Write patches/verl-<release>.diff from the records of the hooks, or check that they are current.

python scripts/source_patches.py [--check]

Each hook becomes a decorator on its target (or, where it is for a whole module, a call at the module's end). Besides
that the dead key ``fsdp_config.dtype`` is honoured, and verl 0.8.0, which knows no plugins, loads ours.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"

sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from verl_releases import release_folder  # noqa: E402

from verl_fp16.hooks import HOOKS  # noqa: E402
from verl_fp16.patching import Hook  # noqa: E402
from verl_fp16.patching.static import SourceTree  # noqa: E402
from verl_fp16.releases import SUPPORTED_VERL  # noqa: E402

_ENGINE = "verl/workers/engine/fsdp/transformer_impl.py"
_PLAIN_LOADING = 'if modules:\n    modules = modules.split(",")\n    import_external_libs(modules)\n'

# (file, text in it, text instead, releases): what is no hook.
EDITS = (
    (
        _ENGINE,
        "        else:\n            param_dtype = torch.bfloat16\n",
        "        else:\n            param_dtype = PrecisionType.to_dtype(self.engine_config.dtype)\n",
        SUPPORTED_VERL,
    ),
    ("verl/__init__.py", _PLAIN_LOADING, f'{_PLAIN_LOADING}\nimport_external_libs(["verl_fp16.plugin"])\n', ("0.8.0",)),
)


def patched_files(version: str) -> dict[str, tuple[str, str]]:
    """File -> its text in the release, and patched."""
    tree = SourceTree(release_folder(version))
    by_module: dict[str, list[Hook]] = defaultdict(list)
    for hook in HOOKS:
        if hook.is_for(version) and hook.target.module.partition(".")[0] == "verl":
            by_module[hook.target.module].append(hook)
    files = {}
    for module, hooks in by_module.items():
        path = tree.path(module)
        files[str(path.relative_to(tree.root))] = (path.read_text(), with_calls(tree, module, hooks))
    for file, old, new, releases in EDITS:
        if version in releases:
            released = (tree.root / file).read_text()
            before, after = files.get(file, (released, released))
            if after.count(old) != 1:
                raise SystemExit(f"source patches: {file} of verl {version} has {after.count(old)} places like {old!r}")
            files[file] = (before, after.replace(old, new))
    return files


def with_calls(tree: SourceTree, module: str, hooks: list[Hook]) -> str:
    """The text of ``module`` with a call for each of ``hooks``."""
    lines = tree.path(module).read_text().splitlines(keepends=True)
    insertions: dict[int, list[str]] = defaultdict(list)  # index of the line before which they go -> lines
    names = set()
    for hook in hooks:
        if hook.target.qualname:
            definition = tree.function(hook.target)
            first = min([definition.lineno, *(d.lineno for d in definition.decorator_list)]) - 1
            # Of several on one function the later one is outermost, as where the patcher puts them on.
            insertions[first].insert(0, f'{" " * definition.col_offset}@verl_fp16_hook("{hook.name}")\n')
            names.add("verl_fp16_hook")
        else:
            insertions[len(lines)].append(f'\nverl_fp16_module_hook(__name__, "{hook.name}")\n')
            names.add("verl_fp16_module_hook")
    insertions[_end_of_imports(tree.module(module))].insert(
        0, f"from verl_fp16.source import {', '.join(sorted(names))}\n"
    )
    for index in sorted(insertions, reverse=True):
        lines[index:index] = insertions[index]
    return "".join(lines)


def _end_of_imports(module: ast.Module) -> int:
    """Index of the line after the last of the imports at the head of a module."""
    last = 0
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        if isinstance(statement, ast.Import | ast.ImportFrom):
            last = statement.end_lineno
    return last


def diff(version: str) -> str:
    """The unified diff for one release, as ``git apply`` takes it."""
    parts = []
    for file, (before, after) in sorted(patched_files(version).items()):
        parts += [f"diff --git a/{file} b/{file}\n"]
        parts += difflib.unified_diff(
            before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{file}", f"b/{file}"
        )
    return "".join(parts)


def main(arguments: list[str]) -> int:
    stale = []
    for version in SUPPORTED_VERL:
        path, text = PATCHES / f"verl-{version}.diff", diff(version)
        if "--check" in arguments:
            stale += [] if path.exists() and path.read_text() == text else [path.name]
        else:
            path.write_text(text)
    if stale:
        print(
            f"source patches: {', '.join(stale)} is not what the hooks say; run {Path(__file__).name}", file=sys.stderr
        )
    return bool(stale)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
