"""Copies what stays of a prompt into packed blocks, before the step in which its images are gone.

Seams: a field of ours on ``SchedulerOutput``, and the KV cache of each attention layer. Runs where vLLM
copies blocks of its own, before anything of the step is computed; nothing waits for the device.

Storage groups share the memory of their blocks, layer by layer, and a block that one request gave back
may be another's in the same step. So of each piece of memory all is read before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_flow.engine.slots import TokenPlaces, token_places
from vllm_flow.layout import TokenLayout
from vllm_flow.rewriting import Rewrite, moved_slots, overlap

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.vllm_flow.moving")

REWRITES_FIELD = "flow_rewrites"
"""On a scheduler's output: request id -> storage group -> :class:`~vllm_flow.rewriting.Rewrite`."""

Rewrites = Mapping[str, Mapping[int, Rewrite]]


def rewrites_of(output: SchedulerOutput) -> Rewrites:
    """What the step's requests move before it; empty in most steps."""
    return getattr(output, REWRITES_FIELD, {})


@dataclass(frozen=True)
class _Layer:
    """One decoder layer's cache."""

    index: int
    group: int
    block_size: int
    """Of the block tables; a kernel may divide their blocks."""
    attention: Any
    places: TokenPlaces


@dataclass(frozen=True)
class _Part:
    """Rows of one request that move in one layer."""

    layer: _Layer
    source_R: torch.Tensor
    target_R: torch.Tensor


class RowMover:
    """Moves rows of one worker's KV cache.

    Args:
        kv_cache_config: names the layers of each group, whose caches are allocated.
        layers: attention layer name -> vLLM's ``Attention``.
    """

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None:
        self.unmovable: str | None = None
        """Why rows of this cache cannot be moved; None where they can."""
        self._memory: dict[Any, list[_Layer]] = {}
        """Layers by the memory that they share with those of other groups."""
        found: dict[Any, TokenPlaces] = {}
        for group, spec in enumerate(kv_cache_config.kv_cache_groups):
            for name in spec.layer_names:
                attention = layers[name]
                alike = (attention.attn_backend, attention.dtype, attention.kv_cache.stride())
                if alike not in found:
                    try:
                        found[alike] = token_places(attention)
                    except (ValueError, RuntimeError, AttributeError) as error:
                        self.unmovable = str(error)
                        logger.warning("Images cannot leave after the prefill: %s", error)
                        return
                cache = attention.kv_cache
                self._memory.setdefault((cache.device, cache.data_ptr()), []).append(
                    _Layer(
                        extract_layer_index(name),
                        group,
                        spec.kv_cache_spec.block_size,
                        attention,
                        found[alike],
                    )
                )

    def move(self, rewrites: Rewrites, layouts: Mapping[str, TokenLayout]) -> None:
        """Copy what stays of some requests' prompts from their old blocks into the new ones."""
        if self.unmovable is not None:  # such requests are refused
            raise RuntimeError(self.unmovable)
        each = [rewrite for of_request in rewrites.values() for rewrite in of_request.values()]
        at_once = overlap(each)
        for layers in self._memory.values():
            parts = list(self._parts(layers, rewrites, layouts))
            for some in [parts] if at_once else [[part] for part in parts]:
                _copy(some)

    def _parts(
        self, layers: Sequence[_Layer], rewrites: Rewrites, layouts: Mapping[str, TokenLayout]
    ) -> Iterator[_Part]:
        for layer in layers:
            for request_id, of_request in rewrites.items():
                rewrite = of_request.get(layer.group)
                if rewrite is None:
                    continue
                layout = layouts[request_id]
                slots = moved_slots(layout, layer.index, rewrite, layer.block_size)
                if len(slots[0]):
                    yield _Part(layer, *_on_device(slots, layer.attention.kv_cache.device))


def _copy(parts: Sequence[_Part]) -> None:
    taken = [part.layer.places.take(part.layer.attention.kv_cache, part.source_R) for part in parts]
    for part, rows in zip(parts, taken, strict=True):
        part.layer.places.put(part.layer.attention.kv_cache, part.target_R, rows)


def _on_device(
    slots: tuple[np.ndarray, np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in a single copy that nobody waits for."""
    host = torch.from_numpy(np.stack(slots))
    if device.type == "cuda":
        host = host.pin_memory()
    source_R, target_R = host.to(device, non_blocking=True).unbind()
    return source_R, target_R
