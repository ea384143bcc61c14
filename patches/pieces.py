"""Patch: the pieces that vLLM compiles a decoder in may be called with fewer rows. Ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap

Dress = Callable[[Callable[..., Any], Any], Callable[..., Any]]


def apply(dress: Dress) -> None:
    """Let vLLM call ``dress(run, backend)`` in the place of ``run``, its callable of a ``PiecewiseBackend``."""
    from vllm.compilation import backends

    wrap(backends, "wrap_with_cudagraph_if_needed", partial(_around_wrap, dress))


def revert() -> None:
    """Put the original back."""
    from vllm.compilation import backends

    unwrap(backends, "wrap_with_cudagraph_if_needed")


def _around_wrap(dress: Dress, original: Callable[..., Any]) -> Callable[..., Any]:
    def wrap_with_cudagraph_if_needed(piecewise_backend: Any, *args: Any, **kwargs: Any) -> Any:
        return dress(original(piecewise_backend, *args, **kwargs), piecewise_backend)

    return wrap_with_cudagraph_if_needed
