"""Patch: ``VllmConfig.__post_init__`` also configures vLLM-Flow. See the ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap


def apply(configure: Callable[[Any], None]) -> None:
    """Call ``configure(vllm_config)`` at the end of every ``VllmConfig.__post_init__``.

    Args:
        configure: must do nothing for configs that do not ask for the extension.
    """
    from vllm.config import VllmConfig

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            configure(self)

        return __post_init__

    wrap(VllmConfig, "__post_init__", around)


def revert() -> None:
    """Put the original back."""
    from vllm.config import VllmConfig

    unwrap(VllmConfig, "__post_init__")
