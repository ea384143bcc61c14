"""Copies what stays of a prompt into packed blocks, before the step in which its images are gone.

Seams: a field of ours on ``SchedulerOutput`` (`wire`), and the KV cache of each attention layer. Runs where vLLM
copies blocks of its own, before anything of the step is computed; nothing waits for the device.

Storage groups share the memory of their blocks, layer by layer, and a block that one request gave back
may be another's in the same step. So of each piece of memory all is read before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_flow.engine.wire import Rewrites
from vllm_flow.engine.worker.caches import CachedLayer, cached_layers
from vllm_flow.engine.worker.choosing.late_scores import LateScores
from vllm_flow.engine.worker.latent import cache_of
from vllm_flow.engine.worker.sending import sent
from vllm_flow.engine.worker.slots import TokenPlaces, token_places
from vllm_flow.layout import TokenLayout
from vllm_flow.rewriting import Rewrite, choosing_plan, moved_positions, overlap

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.vllm_flow.moving")

_Layer = CachedLayer[TokenPlaces]


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
        self._end = 0
        """The layer past the last of them."""
        if kv_cache_config.needs_kv_cache_zeroing:
            self.unmovable = "vLLM empties a step's new blocks after they were filled"
            return
        try:
            for layer in cached_layers(kv_cache_config, layers, token_places):
                cache, self._end = layer.attention.kv_cache, max(self._end, layer.index + 1)
                self._memory.setdefault((cache.device, cache.data_ptr()), []).append(layer)
        except (ValueError, RuntimeError, AttributeError) as error:
            self.unmovable = str(error)
            logger.warning("Images cannot leave after the prefill: %s", error)

    def move(
        self,
        rewrites: Rewrites,
        layouts: Mapping[str, TokenLayout],
        scores: LateScores | None = None,
    ) -> None:
        """Copy what stays of some requests' prompts from their old blocks into the new ones.

        Args:
            scores: what the layouts choose by; not needed where places decide.
        """
        if self.unmovable is not None:  # such requests are refused
            raise RuntimeError(self.unmovable)
        device = next(iter(self._memory.values()))[0].attention.kv_cache.device
        moving = []
        for request_id, of_request in rewrites.items():
            layout, chosen = layouts[request_id], dict[int, torch.Tensor]()
            plan = choosing_plan(layout)
            if plan is not None:
                assert scores is not None
                chosen = scores.kept_positions(request_id, plan, device, self._end)
            moving.append(_Moving(layout, of_request, chosen))
        each = [rewrite for of_request in rewrites.values() for rewrite in of_request.values()]
        at_once = overlap(each)
        for layers in self._memory.values():
            parts = [part for layer in layers for one in moving for part in one.parts(layer)]
            for some in [parts] if at_once else [[part] for part in parts]:
                _copy(some)


@dataclass(frozen=True)
class _Moving:
    """One request on its move."""

    layout: TokenLayout
    rewrites: Mapping[int, Rewrite]
    chosen: Mapping[int, torch.Tensor]
    """First layer of a stage -> positions that stay, where the device chose."""

    slots: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By storage group and stage: layers of both move alike."""

    def parts(self, layer: _Layer) -> Iterator[_Part]:
        """The rows that move in one layer, if any."""
        rewrite = self.rewrites.get(layer.group)
        if rewrite is None:
            return
        alike = (layer.group, self.layout.stage_at(layer.index))
        if alike not in self.slots:
            self.slots[alike] = self._slots(layer, rewrite)
        yield _Part(layer, *self.slots[alike])

    def _slots(self, layer: _Layer, rewrite: Rewrite) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] slots from which and to which the layer's rows move: block times block size plus place."""
        # The block tables' size: a kernel may divide their blocks.
        size, device = layer.spec.block_size, layer.attention.kv_cache.device
        first = rewrite.kept * size
        places = moved_positions(self.layout, layer.index, rewrite, size)
        source_R, target_R, old_S, new_T = _on_device(
            [
                *(positions - first for positions in places),
                *map(np.array, (rewrite.old, rewrite.new)),
            ],
            device,
        )
        stage = self.layout.stage_at(layer.index)
        if self.chosen and stage:
            source_R = self.chosen[self.layout.breaks[stage - 1]][first:] - first
        return (
            old_S[source_R // size] * size + source_R % size,
            new_T[target_R // size] * size + target_R % size,
        )


def _copy(parts: Sequence[_Part]) -> None:
    taken = [part.layer.found.take(cache_of(part.layer.attention), part.source_R) for part in parts]
    for part, rows in zip(parts, taken, strict=True):
        part.layer.found.put(cache_of(part.layer.attention), part.target_R, rows)


def _on_device(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """All of them in a single copy that nobody waits for."""
    host = torch.from_numpy(np.concatenate(arrays, dtype=np.int64))
    return sent(host, device).split([len(array) for array in arrays])
