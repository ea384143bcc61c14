"""Computes what rows attend to, from the paged KV cache, for ranks that go by attention.

Legend: Q query rows, K key heads, G query heads per key head, D head size, S slots that the (last) row sees, B blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from vllm_flow.engine.worker.attention.keys import KeyReader
from vllm_flow.engine.worker.latent import cache_of, queries_of

LOGITS_AT_ONCE = 1 << 24
"""Of several rows, all heads: 64 MiB of them."""


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
    keys_KSD = _keys(attention, read, blocks, visible)
    query_HD = queries_of(attention, row[None])[0]
    query_KGD = query_HD.unflatten(0, (keys_KSD.shape[0], -1)).float()
    logits_KGS = (query_KGD * attention.impl.scale) @ keys_KSD.transpose(1, 2)
    if last is not None:
        past_S = torch.arange(visible, device=row.device) > last
        logits_KGS = logits_KGS.masked_fill(past_S, -float("inf"))
    return logits_KGS.softmax(-1).mean((0, 1))


def mass_of_rows(
    attention: Any,
    read: KeyReader,
    rows: torch.Tensor,
    blocks: torch.Tensor,
    visible: int,
    weights_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """[S] probability that rows of one request give each slot, averaged over rows and this worker's heads.

    Args:
        rows: queries of Q rows that follow one another, all heads.
        blocks: [B] of their request, or more.
        visible: S; every row sees one slot less than the next.
        weights_Q: how much each row counts; all alike if None.
    """
    keys_KSD = _keys(attention, read, blocks, visible)
    query_QHD = queries_of(attention, rows)
    query_KQGD = query_QHD.unflatten(1, (keys_KSD.shape[0], -1)).transpose(0, 1).float()
    weights_Q = query_KQGD.new_ones(len(rows)) if weights_Q is None else weights_Q
    slots_S = torch.arange(visible, device=rows.device)
    last_Q = torch.arange(visible - len(rows), visible, device=rows.device)
    mass_S = query_KQGD.new_zeros(visible)
    at_once = max(1, LOGITS_AT_ONCE // (query_QHD.shape[1] * visible))
    for first in range(0, len(rows), at_once):
        some = slice(first, first + at_once)
        query_KqGD = query_KQGD[:, some] * attention.impl.scale
        # Rows and groups in one dimension: keys broadcast over either would be copied for each.
        logits_KrS = query_KqGD.flatten(1, 2) @ keys_KSD.transpose(1, 2)
        logits_KqGS = logits_KrS.unflatten(1, query_KqGD.shape[1:3])
        unseen_qS = slots_S > last_Q[some, None]
        logits_KqGS = logits_KqGS.masked_fill(unseen_qS[:, None], -float("inf"))
        mass_S += weights_Q[some] @ logits_KqGS.softmax(-1).mean((0, 2))
    return mass_S / weights_Q.sum()


def _keys(attention: Any, read: KeyReader, blocks: torch.Tensor, visible: int) -> torch.Tensor:
    """[K, S, D] keys of a request's first slots."""
    cache = cache_of(attention)
    count = -(-visible // cache.shape[2])
    keys = read(cache, blocks[:count].long(), attention.head_size)
    return keys.transpose(0, 1).flatten(1, 2)[:, :visible].float()


def mean_over_workers(mass_M: torch.Tensor) -> torch.Tensor:
    """Each worker has heads of its own; with other sums they would keep other rows."""
    workers = get_tensor_model_parallel_world_size()
    return tensor_model_parallel_all_reduce(mass_M) / workers if workers > 1 else mass_M
