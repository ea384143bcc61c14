"""Replaces methods and attributes of single live objects of vLLM's for as long as a context lasts.

An instance attribute hides the class's method and leaves other instances alone. `adoption` is for what
is to stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


@contextmanager
def replaced(name: str, pairs: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Give each of some objects another method or value ``name``, and back what it had of its own.

    Args:
        pairs: an object each, and what stands in the place of its own.
    """
    pairs = tuple(pairs)
    own = [vars(instance).get(name, _NOTHING) for instance, _ in pairs]
    for instance, method in pairs:
        vars(instance)[name] = method
    try:
        yield
    finally:
        for (instance, _), method in zip(pairs, own, strict=True):
            if method is _NOTHING:
                del vars(instance)[name]
            else:
                vars(instance)[name] = method
