"""Query rows over paged caches as the attention log meets them: for the kernel's tests, on whatever device.

Requests, their spans and the packing past the cliff are the engine's own; what no row sees is not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.engine.test_keys import strided
from vllm_flow.attention import KeySpans, LoggedRequest
from vllm_flow.engine.worker.attention.keys import STRIDED, KeyReader, column_major, token_major
from vllm_flow.layout import TokenLayout
from vllm_flow.log_keys import AttentionLog
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

CLIFF = 1
"""Of the requests that evict; layer 0 sees their images, layer 1 does not."""

Case = tuple[torch.Tensor, torch.Tensor, KeyReader, torch.Tensor, torch.Tensor, float]
"""Arguments of `span_lse`."""


@dataclass(frozen=True)
class Heads:
    """An attention layer's sizes, and how its backend stores keys."""

    query: int
    key: int
    size: int
    slots: int
    layout: KVCacheLayout = KVCacheLayout.LBNHC
    read: KeyReader = token_major

    def __str__(self) -> str:
        names = self.layout.name, self.read.__name__
        return f"{self.query}-{self.key}-{self.size}-{self.slots}-{'-'.join(names)}"


@dataclass(frozen=True)
class Row:
    """The last row of a request."""

    prompt: int
    images: tuple[tuple[int, int], ...] = ()
    answered: int = 1
    evicts: bool = False
    heat: bool = False

    def bounds(self, layer: int) -> np.ndarray:
        spans = ImageSpans.from_ranges(self.images)
        policy = FlowPolicy.withdrawal(CLIFF) if self.evicts else None
        request = LoggedRequest(
            AttentionLog((layer,), self.heat),
            self.prompt,
            KeySpans.of(self.prompt, [[image] for image in self.images], single=self.heat),
            TokenLayout.of(policy, spans),
        )
        return request.bounds(self.prompt + self.answered, layer)


GROUPS = (
    Heads(4, 4, 64, 16),
    Heads(8, 2, 128, 32),
    Heads(6, 2, 64, 32, KVCacheLayout.LBHNC),  # three query heads to a key head
    Heads(7, 1, 80, 16, KVCacheLayout.LHBNC),
    Heads(4, 1, 64, 32, KVCacheLayout.LBHNC, column_major),  # vLLM's on CPU
)

BATCHES = {
    "text": [Row(5), Row(40, answered=9)],
    "one image": [Row(70, ((3, 60),), answered=2)],
    "two images": [Row(90, ((7, 30), (40, 70)), answered=30)],
    "heat": [Row(20, ((4, 12),), heat=True), Row(12, ((2, 9),))],
    "evicted": [
        Row(80, ((3, 60),), evicts=True),
        Row(80, ((3, 60),)),
        Row(60, ((0, 3), (20, 24)), answered=33, evicts=True, heat=True),
    ],
}


def make(
    heads: Heads, rows: Sequence[Row], layer: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Case:
    """Random queries and keys for a batch, in a cache with blocks in any order."""
    rng = torch.Generator().manual_seed(seed)
    bounds = [row.bounds(layer) for row in rows]
    widest = max(map(len, bounds))
    table = torch.tensor(np.stack([np.pad(b, (0, widest - len(b)), mode="edge") for b in bounds]))
    needed = (table[:, -1] + heads.slots - 1) // heads.slots
    count = int(needed.sum()) + 3
    shuffled = torch.randperm(count, generator=rng)
    blocks = torch.zeros((len(rows), int(needed.max())), dtype=torch.int64)
    cache = strided(heads.layout, dtype, (count, heads.key, heads.slots, 2 * heads.size))
    cache[:] = torch.nan
    keys = STRIDED[heads.read](cache, heads.size)
    at = 0
    for row, own in enumerate(needed.tolist()):
        blocks[row, :own] = shuffled[at : at + own]
        at += own
        for slot in range(int(table[row, -1])):
            block, offset = divmod(slot, heads.slots)
            keys[blocks[row, block], :, offset] = torch.randn(
                (heads.key, heads.size), generator=rng
            ).to(dtype)
    query = (2 * torch.randn((len(rows), heads.query, heads.size), generator=rng)).to(dtype)
    moved = [x.to(device) for x in (query, cache, blocks, table)]
    return moved[0], moved[1], heads.read, moved[2], moved[3], heads.size**-0.5
