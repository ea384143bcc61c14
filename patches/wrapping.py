"""Wraps a method or function of somebody else's once, and unwraps it. Knows no target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_vllm_flow_original"


def wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``around(original)``; nothing where that was done before.

    Args:
        owner: a class or a module.
    """
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    wrapper = functools.wraps(original)(around(original))
    setattr(wrapper, _MARK, original)
    setattr(owner, name, wrapper)


def unwrap(owner: Any, name: str) -> None:
    """Put the original back."""
    current = getattr(owner, name)
    setattr(owner, name, getattr(current, _MARK, current))
