"""A short name for what a function does: equal for equal code, whatever Python parses it and wherever it stands.

The hash is over the syntax tree without positions, docstring and fields that are empty or that only some Python
versions have; so comments, layout and documentation do not count, every other change does, a decorator too.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Present in some Python versions only, or set by the parser from comments.
_IGNORED_FIELDS = ("type_comment", "type_ignores", "kind", "type_params")


def fingerprint(function: Function) -> str:
    """Sixteen hexadecimal digits for a function's parameters, decorators and body."""
    return hashlib.sha256("".join(_tokens(function, top=True)).encode()).hexdigest()[:16]


def _tokens(node: Any, top: bool = False) -> Iterator[str]:
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for field, value in ast.iter_fields(node):
            if top and field == "body":
                value = without_docstring(value)
            if field not in _IGNORED_FIELDS and value is not None and value != []:
                yield f"{field}="
                yield from _tokens(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _tokens(item)
        yield "]"
    else:
        yield f"{type(node).__name__}:{node!r};"


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_docstring else body


def fingerprint_of(function: Callable[..., Any]) -> str:
    """The fingerprint of a live function, from its source file; of what is wrapped, where it is a wrapper.

    Raises:
        OSError: the source is not to be found, or is not the one that was imported.
    """
    code = inspect.unwrap(function).__code__
    definition = _functions_of(code.co_filename).get(code.co_firstlineno)
    if definition is None or definition.name != code.co_name:
        raise OSError(f"{code.co_filename}, line {code.co_firstlineno}, does not define {code.co_name} any more")
    return fingerprint(definition)


@functools.cache
def _functions_of(filename: str) -> dict[int, Function]:
    """First line, decorators included, as in a code object -> definition."""
    tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, Function))
    return {min([f.lineno, *(d.lineno for d in f.decorator_list)]): f for f in functions}
