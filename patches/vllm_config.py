"""Patch: ``VllmConfig.__post_init__`` also configures vLLM-Flow. See the ledger in README.md."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_vllm_flow_patch"


def apply(configure: Callable[[Any], None]) -> None:
    """Call ``configure(vllm_config)`` at the end of every ``VllmConfig.__post_init__``.

    Args:
        configure: must do nothing for configs that do not ask for the extension.
    """
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        configure(self)

    setattr(__post_init__, _MARK, original)
    VllmConfig.__post_init__ = __post_init__


def revert() -> None:
    """Put the original back."""
    from vllm.config import VllmConfig

    VllmConfig.__post_init__ = getattr(VllmConfig.__post_init__, _MARK, VllmConfig.__post_init__)
