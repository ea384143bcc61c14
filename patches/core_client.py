"""Patch: ``EngineCoreClient``'s factories let requests pass our cache, and ask what the engine cannot do.

See the ledger in README.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap

FACTORIES = ("make_client", "make_async_mp_client")


def apply() -> None:
    """Have each request pass the front end's picture cache, and the front end know its engine.

    An engine without the extension is not asked.
    """
    from vllm.v1.engine.core_client import EngineCoreClient

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def make(*args: Any, renderer: Any = None, **kwargs: Any) -> Any:
            client = original(*args, renderer=renderer, **kwargs)
            if renderer is not None:
                from vllm_flow.engine.front_end.processor_cache import pass_through

                pass_through(client, renderer)
            from vllm_flow.engine import obstacles
            from vllm_flow.engine.front_end import default_policies
            from vllm_flow.engine.settings import FlowSettings

            config = signature.bind_partial(*args, **kwargs).arguments["vllm_config"]
            if FlowSettings.of(config) is not None:
                obstacles.ask(
                    client,
                    config,
                    lambda: default_policies.warn_of_obstacles(FlowSettings.of(config)),
                )
            return client

        return make

    for name in FACTORIES:
        wrap(EngineCoreClient, name, around)


def revert() -> None:
    """Put the originals back."""
    from vllm.v1.engine.core_client import EngineCoreClient

    for name in FACTORIES:
        unwrap(EngineCoreClient, name)
