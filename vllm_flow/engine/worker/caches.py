"""The layers of an allocated KV cache, and how each of them stores its tokens.

This is found out by writing into the cache and reading it back, once for all layers of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vllm.model_executor.models.utils import extract_layer_index

from vllm_flow.engine.draft_layers import layer_in_group
from vllm_flow.engine.states import is_state
from vllm_flow.engine.worker.attention.keys import chunk_of, extra_logits, window_of

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class CachedLayer(Generic[Found]):
    """One decoder layer's cache."""

    index: int
    """Below 0 of a drafter's."""
    group: int
    spec: KVCacheSpec
    """Of its storage group."""
    attention: Any
    """vLLM's ``Attention`` or ``MLAAttention``."""
    found: Found


def widest_first(kv_caches: list[torch.Tensor]) -> None:
    """Sort a runner's list of caches so that whoever copies a block by it copies all of the block.

    vLLM copies what begins at one address once, as the first layer on the list has it. Where layers with keys share
    pages with layers whose state is smaller than a page, the first would be one of those, and keys would stay behind.

    Args:
        kv_caches: a view per layer, over as many blocks each.
    """
    kv_caches.sort(key=lambda cache: cache.numel() * cache.element_size(), reverse=True)


def cached_layers(
    kv_cache_config: KVCacheConfig, layers: Mapping[str, Any], ask: Callable[[Any], Found]
) -> Iterator[CachedLayer[Found]]:
    """Every layer with keys and values, group by group.

    Args:
        kv_cache_config: names the layers of each group, whose caches are allocated.
        layers: attention layer name -> vLLM's ``Attention``.
        ask: what to find out of an ``Attention``; of those alike in backend, type, strides, sliding window, chunk
            and what their softmax has beside dot products, of one only.
    """
    known: dict[Any, Found] = {}
    for group, spec in enumerate(kv_cache_config.kv_cache_groups):
        if is_state(spec.kv_cache_spec):
            continue
        for name in spec.layer_names:
            attention = layers[name]
            cache = attention.kv_cache
            layout = (attention.attn_backend, cache.dtype, cache.stride())
            seen = window_of(attention.impl), chunk_of(attention), extra_logits(attention)
            alike = (*layout, getattr(attention, "dtype", None), *seen)
            if alike not in known:
                known[alike] = ask(attention)
            index = layer_in_group(name, extract_layer_index(name), spec.kv_cache_spec)
            yield CachedLayer(index, group, spec.kv_cache_spec, attention, known[alike])
