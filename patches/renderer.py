"""Patch: ``vllm.renderers.base.processor_cache_from_config`` makes our cache. Ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap


def apply() -> None:
    """Give renderers of engines with the extension a picture cache that refusals do not change."""
    from vllm.renderers import base

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def processor_cache_from_config(vllm_config: Any) -> Any:
            from vllm_flow.engine.front_end.processor_cache import in_place_of
            from vllm_flow.engine.settings import FlowSettings

            cache = original(vllm_config)
            if FlowSettings.of(vllm_config) is None:
                return cache
            return in_place_of(cache, vllm_config.model_config)

        return processor_cache_from_config

    wrap(base, "processor_cache_from_config", around)


def revert() -> None:
    """Put the original back."""
    from vllm.renderers import base

    unwrap(base, "processor_cache_from_config")
