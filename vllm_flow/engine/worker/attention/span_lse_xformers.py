"""The log-sum-exp over spans by xformers: partial attention of every row over every span of its keys.

Same arguments and result as :func:`vllm_flow.engine.worker.attention.keys.span_lse`, its reference. An alternative to
:mod:`vllm_flow.engine.worker.attention.span_lse_triton` for those who have xformers and would rather run its
kernel than ours. Legend: :mod:`vllm_flow.engine.worker.attention.keys`; P pairs of a row and a span, G query
heads per key head.

Seams: ``memory_efficient_attention_partial``, its op with split keys in Triton (whose tile can be made as small as
vLLM's blocks), and ``PagedBlockDiagonalGappyKeysMask``. To it a pair is a sequence of one query whose
keys begin anywhere in its pages. It wants one stride from slot to slot across all pages; where a block takes the
room of several (heads before slots, other layers in between), a page is made of its first slots and the block
table counts in such pages. Values are of no interest, so the keys stand in for them and are not read from
memory twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm_flow.engine.worker.attention import xformers_needs
from vllm_flow.engine.worker.attention.keys import STRIDED, KeyReader
from vllm_flow.engine.worker.attention.span_lse_triton import SpanLse

LARGEST_TILE = 64
"""Slots that the op reads at a time unless pages are smaller; it needs 16 for its matrix products."""


def span_lse_xformers(
    query_QHD: torch.Tensor,
    cache_BKNC: torch.Tensor,
    read: KeyReader,
    blocks_QM: torch.Tensor,
    bounds_QS1: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Log-sum-exp of each query row's logits over consecutive spans of its keys, in float32.

    Arguments and result are those of :func:`vllm_flow.engine.worker.attention.keys.span_lse`; :func:`against` must have
    nothing against the cache. The op multiplies in the queries' 16 bits and sums in float32.
    """
    num_rows, num_spans = len(query_QHD), bounds_QS1.shape[1] - 1
    keys_BKND = STRIDED[read](cache_BKNC, query_QHD.shape[-1])
    num_key_heads, slots = keys_BKND.shape[1:3]
    starts_P, ends_P = bounds_QS1[:, :-1].flatten(), bounds_QS1[:, 1:].flatten()
    query_PHD = query_QHD.repeat_interleave(num_spans, 0)
    pages_PM = (blocks_QM * pages_of_a_block(keys_BKND)).int().repeat_interleave(num_spans, 0)
    found = [
        partial_lse(
            query_PHD[part],
            keys_BKND,
            mask_of(pages_PM[part], starts_P[part], ends_P[part], slots),
            scale,
        )
        for part in xformers_needs.parts(len(query_PHD), num_key_heads)
    ]
    # Of an empty span that begins within a tile the op makes no number.
    lse_HP = torch.cat(found, 1).masked_fill(starts_P == ends_P, -torch.inf)
    return lse_HP.unflatten(1, (num_rows, num_spans)).transpose(0, 1)


def partial_lse(
    query_PHD: torch.Tensor, keys_BKND: torch.Tensor, mask: Any, scale: float
) -> torch.Tensor:
    """[H, P] float32: each pair's own log-sum-exp."""
    from xformers.ops.fmha import memory_efficient_attention_partial

    query, key = inputs_of(query_PHD, keys_BKND)
    _, lse_1KGP = memory_efficient_attention_partial(
        query, key, key, mask, scale=scale, op=op_for(keys_BKND.shape[2])
    )
    return lse_1KGP[0].flatten(0, 1).float()


def inputs_of(
    query_PHD: torch.Tensor, keys_BKND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [1, P, K, G, D] and, where they lie, keys [1, slots of all pages, K, G, D]."""
    num_blocks, num_key_heads, slots, head_size = keys_BKND.shape
    group = query_PHD.shape[1] // num_key_heads
    _, stride_head, stride_slot, stride_dim = keys_BKND.stride()
    # The last block's further pages are not there.
    num_pages = (num_blocks - 1) * pages_of_a_block(keys_BKND) + 1
    key = keys_BKND.as_strided(
        (1, num_pages * slots, num_key_heads, group, head_size),
        (0, stride_slot, stride_head, 0, stride_dim),
    )
    return query_PHD.unflatten(1, (num_key_heads, group))[None], key


def pages_of_a_block(keys_BKND: torch.Tensor) -> int:
    """How many times a block's slots of one head fit between it and the next block."""
    return keys_BKND.stride(0) // (keys_BKND.stride(2) * keys_BKND.shape[2])


def mask_of(
    pages_PM: torch.Tensor, starts_P: torch.Tensor, ends_P: torch.Tensor, slots: int
) -> Any:
    """xformers' bias in which pair p sees the slots from ``starts[p]`` up to ``ends[p]`` of its own pages."""
    from xformers.ops.fmha.attn_bias import (
        BlockDiagonalGappyKeysMask,
        PagedBlockDiagonalGappyKeysMask,
    )

    pairs = len(starts_P)
    unpaged = BlockDiagonalGappyKeysMask.from_seqlens(
        [1] * pairs, [0] * (pairs + 1), [1] * pairs, device=pages_PM.device
    )
    mask = unpaged.make_paged(pages_PM, slots, 0, PagedBlockDiagonalGappyKeysMask)
    # Where spans lie is known on the device, and this is all that the op reads of it there. Its host copy
    # says "one key each"; to bring it up to date, the host would have to wait for the device in every layer.
    mask.k_seqinfo.seqstart[:pairs] = starts_P
    mask.k_seqinfo.seqlen[:] = ends_P
    return mask


def op_for(slots: int) -> Any:
    """The op for pages of so many slots."""
    from xformers.ops.fmha.triton_splitk import FwOp

    # None: how many programs share a pair's keys is left to the op.
    return FwOp.get_operator(None, block_n=math.gcd(slots, LARGEST_TILE))


def lse_function(attention: Any, read: KeyReader) -> SpanLse:
    """:func:`span_lse_xformers` for one attention layer.

    Raises:
        ValueError: something stands against it; says what.
    """
    reason = against(attention, read)
    if reason is not None:
        raise ValueError(
            f"the attention log cannot use attention_log_kernel='xformers': {reason}; leave it out."
        )
    return span_lse_xformers


def against(attention: Any, read: KeyReader) -> str | None:
    """What keeps xformers from reading a layer's keys; None if nothing does.

    What its op takes (devices, types, sizes of heads) it is asked itself, with one row.
    """
    lacking = xformers_needs.missing()
    if lacking is not None:
        return lacking
    if read not in STRIDED:
        return f"the backend stores keys as {read.__name__}, out of the reach of strides"
    keys_BKND = STRIDED[read](attention.kv_cache, attention.head_size)
    slots, (stride_block, _, stride_slot, stride_dim) = keys_BKND.shape[2], keys_BKND.stride()
    if slots % 16:
        return f"blocks of {slots} slots are not a multiple of 16"
    if stride_dim != 1 or stride_block % (stride_slot * slots):
        return f"the backend stores keys as {read.__name__}, not key after key"
    device = attention.kv_cache.device
    no_page, no_slot = torch.zeros((1, 1), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    row = torch.zeros((1, attention.num_heads, attention.head_size), dtype=attention.dtype)
    mask = mask_of(no_page.to(device), no_slot.to(device), no_slot.to(device), slots)
    return _reasons(row.to(device), keys_BKND, mask)


def _reasons(row_PHD: torch.Tensor, keys_BKND: torch.Tensor, mask: Any) -> str | None:
    from xformers.ops.fmha.common import Inputs

    query, key = inputs_of(row_PHD, keys_BKND)
    op = op_for(keys_BKND.shape[2])
    found = op.not_supported_reasons(Inputs(query, key, key, mask, scale=1.0, is_partial=True))
    return ", ".join(found) or None
