"""What one row attends to, from the paged KV cache: what ranks by attention go by.

Legend: K key heads, G query heads per key head, D head size, S slots that the row sees, B blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from vllm_flow.engine.attention.keys import KeyReader
from vllm_flow.engine.latent import cache_of, queries_of


def mass(
    attention: Any,
    read: KeyReader,
    row: torch.Tensor,
    blocks: torch.Tensor,
    visible: int,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """[S] probability that one row gives each of the slots it sees, averaged over this worker's heads.

    Args:
        row: its query, all heads.
        blocks: [B] of its request, or more.
        visible: S.
        last: of which slot on the row sees nothing, where only the device knows; the last that it sees.
    """
    head_size = attention.head_size
    cache = cache_of(attention)
    count = -(-visible // cache.shape[2])
    keys = read(cache, blocks[:count].long(), head_size)
    keys_KSD = keys.transpose(0, 1).flatten(1, 2)[:, :visible].float()
    query_HD = queries_of(attention, row[None])[0]
    query_KGD = query_HD.unflatten(0, (keys_KSD.shape[0], -1)).float()
    logits_KGS = (query_KGD * attention.impl.scale) @ keys_KSD.transpose(1, 2)
    if last is not None:
        past_S = torch.arange(visible, device=row.device) > last
        logits_KGS = logits_KGS.masked_fill(past_S, -float("inf"))
    return logits_KGS.softmax(-1).mean((0, 1))


def mean_over_workers(mass_M: torch.Tensor) -> torch.Tensor:
    """Each worker has heads of its own; with other sums they would keep other rows."""
    workers = get_tensor_model_parallel_world_size()
    return tensor_model_parallel_all_reduce(mass_M) / workers if workers > 1 else mass_M
