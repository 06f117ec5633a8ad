"""The patcher's checks on source files: nothing is imported, so a release can be judged in milliseconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from verl_fp16.patching.fingerprint import Function, fingerprint
from verl_fp16.patching.records import Hook, PatchError, Target


class SourceTree:
    """The source files under one folder, as modules.

    Args:
        root: the folder in which the top-level package lies (``site-packages``, a checkout, an unpacked wheel).
    """

    def __init__(self, root: Path):
        self.root = root
        self._modules: dict[str, ast.Module] = {}

    @classmethod
    def of_package(cls, name: str) -> SourceTree:
        """The tree that ``import name`` would take its modules from.

        Raises:
            PatchError: there is no such package.
        """
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise PatchError(f"{name} is not installed here")
        return cls(Path(next(iter(spec.submodule_search_locations))).parent)

    def path(self, module: str) -> Path | None:
        """The file of ``module``; None where there is none."""
        base = self.root.joinpath(*module.split("."))
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)

    def module(self, module: str) -> ast.Module | None:
        """The parsed file of ``module``."""
        if module not in self._modules:
            path = self.path(module)
            if path is None:
                return None
            self._modules[module] = ast.parse(path.read_text(encoding="utf-8"))
        return self._modules[module]

    def function(self, target: Target) -> Function | None:
        """The definition of ``target``. Of several (under ``if`` or ``try``) the last."""
        node: ast.AST | None = self.module(target.module)
        for name in target.qualname.split("."):
            node = next((found for found in reversed(list(_definitions(node))) if found.name == name), None)
        return node if isinstance(node, Function) else None


def _definitions(node: ast.AST | None) -> Iterator[Function | ast.ClassDef]:
    """Functions and classes that the body of ``node`` defines, also under ``if`` and ``try``."""
    for child in ast.iter_child_nodes(node) if node is not None else ():
        if isinstance(child, Function | ast.ClassDef):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _definitions(child)


def problems(hooks: Iterable[Hook], version: str, tree: SourceTree) -> dict[str, list[str]]:
    """What is wrong with each hook that is for ``version``, in the sources of ``tree``.

    Returns:
        hook name -> messages; a hook that fits has an empty list, a hook that is not for ``version`` is left out.
    """
    return {
        hook.name: [message for target in (hook.target, *hook.relies_on) for message in _target_problems(target, tree)]
        for hook in hooks
        if hook.is_for(version)
    }


def _target_problems(target: Target, tree: SourceTree) -> list[str]:
    if tree.path(target.module) is None:
        return [f"{target.path}: there is no module {target.module} in this release"]
    if not target.qualname:
        return []
    function = tree.function(target)
    if function is None:
        return [f"{target.path} does not exist in this release"]
    found = []
    parameters = parameter_names(function)
    if missing := [name for name in target.parameters if name not in parameters]:
        found.append(f"{target.path}({', '.join(parameters)}) lacks the parameters {missing} it relies on")
    if target.bodies and not patched_in_source(function) and fingerprint(function) not in target.bodies:
        found.append(unknown_body(target, fingerprint(function)))
    return found


def parameter_names(function: Function) -> list[str]:
    """Names of all parameters, ``self`` and the starred ones too."""
    a = function.args
    listed = [
        *a.posonlyargs,
        *a.args,
        *([a.vararg] if a.vararg else []),
        *a.kwonlyargs,
        *([a.kwarg] if a.kwarg else []),
    ]
    return [argument.arg for argument in listed]


def patched_in_source(function: Function) -> bool:
    """Whether the definition carries the decorator of :mod:`verl_fp16.source`."""
    return any(
        isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "verl_fp16_hook"
        for d in function.decorator_list
    )


def unknown_body(target: Target, found: str) -> str:
    """The message for a body that is none of those we know."""
    return (
        f"the body of {target.path} (fingerprint {found}) is none of those that the hook was written for "
        f"({', '.join(target.bodies)}). Restore the released file, or, for a fork of your own, apply the source patch: "
        "verl-fp16 patch-source PATH"
    )
