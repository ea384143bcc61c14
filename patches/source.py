"""Finds a function in the source of an installed package, without importing it.

vLLM takes ten seconds of processor time to import; whether a patch's target is there can be read.
Knows modules, classes with their bases, functions, and names that a module imports from another.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"
Defined: TypeAlias = "tuple[str, ast.ClassDef | Function]"
"""A module's name, and what is defined in it."""


class Missing(LookupError):
    """Something is not where it was looked for; the message names it."""


def parameters(module: str, name: str) -> tuple[str, ...]:
    """Names of a function's parameters, ``self`` and ``cls`` among them.

    Args:
        module: dotted; its package must be installed.
        name: dotted within the module: ``function`` or ``Class.method``, inherited or not.

    Raises:
        Missing: there is no such module, class or function.
    """
    first, *rest = name.split(".")
    found = _definition(module, first)
    for part in rest:
        found = _member(found, part)
    node = found[1]
    if isinstance(node, ast.ClassDef):
        raise Missing(f"{name} is a class")
    taken = node.args
    every = [*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg]
    return tuple(one.arg for one in every if one is not None)


def _definition(module: str, name: str, asked: frozenset[tuple[str, str]] = frozenset()) -> Defined:
    """Where a module's name is defined, be it in another module."""
    if (module, name) in asked:
        raise Missing(f"{module} imports {name} from itself")
    asked |= {(module, name)}
    stars = []
    for node in _statements(_parsed(module)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name == name:
                return module, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_absolute(module, node), alias.name, asked)
                if alias.name == "*":
                    stars.append(_absolute(module, node))
    for other in stars:
        try:
            return _definition(other, name, asked)
        except Missing:
            continue
    raise Missing(f"{module} has no {name}")


def _member(owner: Defined, name: str) -> Defined:
    """A class's function, its own or the first base's that has it."""
    module, node = owner
    if not isinstance(node, ast.ClassDef):
        raise Missing(f"{node.name} is no class")
    for inner in _statements(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) and inner.name == name:
            return module, inner
    for base in node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(plain, ast.Name):
            try:
                return _member(_definition(module, plain.id), name)
            except Missing:
                continue
    raise Missing(f"{module}.{node.name} has no {name}")


def _statements(node: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """The statements of a body, those under ``if`` and ``try`` too, not those of functions."""
    waiting: list[ast.AST] = list(reversed(node.body))
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.stmt):
            yield one
        if isinstance(one, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            waiting += reversed(list(ast.iter_child_nodes(one)))


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that a ``from`` statement names."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if _file(module).name == "__init__.py" else module.split(".")[:-1]
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


@lru_cache(maxsize=64)
def _parsed(module: str) -> ast.Module:
    return ast.parse(_file(module).read_bytes())


@lru_cache(maxsize=64)
def _file(module: str) -> Path:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # of a package at the top nothing is imported
    if spec is None:
        raise Missing(f"no module named {module}")
    if not rest and spec.origin:
        return Path(spec.origin)
    for folder in spec.submodule_search_locations or ():
        where = Path(folder).joinpath(*rest)
        for file in (where / "__init__.py", where.with_suffix(".py")):
            if file.is_file():
                return file
    raise Missing(f"no module named {module}")
