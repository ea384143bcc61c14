"""What xformers' kernel needs of an environment; imports neither it nor vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

MOST_PROGRAMS = 65535
"""Of a CUDA grid's second dimension, in which its op counts pairs of a row and a span times key heads."""
WITHOUT_BLOCK_POINTERS = Version("3.9")
"""Triton from here on; torch 2.14, and so vLLM 0.33, comes with 3.8."""


def parts(pairs: int, key_heads: int) -> Iterator[slice]:
    """The pairs of a row and a span in as many calls of the op as the grid makes of them."""
    at_once = max(1, MOST_PROGRAMS // key_heads)
    return (slice(at, at + at_once) for at in range(0, pairs, at_once))


def missing() -> str | None:
    """What is missing, as part of a sentence; None if nothing is."""
    for name in ("xformers", "triton"):
        if find_spec(name) is None:
            return f"{name} is not installed (pip install 'vllm-flow[xformers]')"
    triton = version("triton")
    if Version(triton) >= WITHOUT_BLOCK_POINTERS:
        return f"its kernel needs block pointers, which Triton {triton} has no longer"
    return None
