"""Patch: ``vllm.plugins.load_endpoint_plugins`` also returns ours. See the ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap


def apply(make: Callable[[], Any]) -> None:
    """Let vLLM's server attach ``make()`` beside the endpoint plugins that the operator named.

    Args:
        make: returns an object with the interface of ``vllm.plugins.endpoint_plugins``.
    """
    from vllm import plugins

    def around(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
            return [*original(*args, **kwargs), make()]

        return load_endpoint_plugins

    wrap(plugins, "load_endpoint_plugins", around)


def revert() -> None:
    """Put the original back."""
    from vllm import plugins

    unwrap(plugins, "load_endpoint_plugins")
