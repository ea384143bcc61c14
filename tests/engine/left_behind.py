"""Finds what an idle engine still keeps of requests: their ids, anywhere among the objects that it reaches.

Every dictionary by request id must lose an entry on every way out, whoever wrote it. Knows no class of vLLM's.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

PLAIN = (int, float, bytes, type(None), torch.Tensor, np.ndarray)
CODE = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, types.CodeType)


def found(roots: Mapping[str, Any], ids: Collection[str]) -> dict[str, str]:
    """Where ids are kept: the way there from a root, by names of attributes, and one of the ids.

    Args:
        roots: by name. What only a function's closure reaches is not looked at.
    """
    kept: dict[str, str] = {}
    seen: set[int] = set()
    # The objects stay referenced: of one that is made on the way, another one might get the address.
    waiting: list[tuple[str, Any]] = list(roots.items())
    held: list[Any] = []
    while waiting:
        path, one = waiting.pop()
        if isinstance(one, str):
            if one in ids:
                kept[path] = one
            continue
        if isinstance(one, (*PLAIN, *CODE)) or id(one) in seen:
            continue
        seen.add(id(one))
        held.append(one)
        waiting += [(path + step, other) for step, other in _reached(one)]
    return kept


def _reached(one: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(one, dict):
        for key, value in list(one.items()):
            yield "", key
            yield "[]", value
    elif isinstance(one, (list, tuple, set, frozenset)) or type(one).__name__ == "deque":
        for value in list(one):
            yield "[]", value
    fields = getattr(one, "__dict__", None)
    if isinstance(fields, dict):
        for name, value in list(fields.items()):
            yield f".{name}", value
    for kind in type(one).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(one, name):
                yield f".{name}", getattr(one, name)
