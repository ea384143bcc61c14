"""Hides methods and attributes of single live objects of vLLM's for as long as a context lasts.

An instance attribute hides the class's method and leaves other instances alone. `adoption` is for what
is to stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


@contextmanager
def hidden(name: str, replacements: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Give each of some objects another method or value ``name``, and back what it had of its own.

    Args:
        replacements: pairs of an object and what stands in the place of its own.
    """
    replacements = tuple(replacements)
    own = [vars(instance).get(name, _NOTHING) for instance, _ in replacements]
    for instance, method in replacements:
        vars(instance)[name] = method
    try:
        yield
    finally:
        for (instance, _), method in zip(replacements, own, strict=True):
            if method is _NOTHING:
                del vars(instance)[name]
            else:
                vars(instance)[name] = method
