"""Patch: ``EngineCoreClient``'s factories let requests pass our cache. See the ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap

FACTORIES = ("make_client", "make_async_mp_client")


def apply() -> None:
    """Have each request pass the front end's picture cache on its way to the engine."""
    from vllm.v1.engine.core_client import EngineCoreClient

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, renderer: Any = None, **kwargs: Any) -> Any:
            client = original(*args, renderer=renderer, **kwargs)
            if renderer is not None:
                from vllm_flow.engine.pictures import pass_through

                pass_through(client, renderer)
            return client

        return make

    for name in FACTORIES:
        wrap(EngineCoreClient, name, around)


def revert() -> None:
    """Put the originals back."""
    from vllm.v1.engine.core_client import EngineCoreClient

    for name in FACTORIES:
        unwrap(EngineCoreClient, name)
