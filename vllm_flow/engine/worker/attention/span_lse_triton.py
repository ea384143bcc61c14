"""The log-sum-exp over spans as one Triton kernel: keys are read where they lie, once, and nothing is gathered.

Same arguments and result as :func:`vllm_flow.engine.worker.attention.keys.span_lse`, its reference. Knows neither
requests nor layers; :func:`lse_function` says when it runs. Legend: :mod:`vllm_flow.engine.worker.attention.keys`.

A program takes one span of one row, or ``PART`` slots of it, for one key head and all query heads that
share it, so that no two programs read the same key. It goes through its slots tile by tile with a running
maximum and sum (M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv
1805.02867). Parts of long spans are joined by ``torch.logsumexp``.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON, tl, triton

from vllm_flow.engine.worker.attention.keys import STRIDED, KeyReader, span_lse
from vllm_flow.engine.worker.latent import cache_of

logger = init_logger("vllm.vllm_flow.attention_log")

Kernel = Literal["auto", "triton", "torch", "xformers"]
SpanLse = Callable[
    [torch.Tensor, torch.Tensor, KeyReader, torch.Tensor, torch.Tensor, float], torch.Tensor
]

PART = 1024
"""Most slots of one program: long spans are shared out among several."""
TILE_PRODUCTS = 8192
"""Products of queries and keys that a program holds at a time: about 100 registers a thread on sm_90,
nothing spilled."""


# What differs from step to step is not specialised, be it a stride or where in memory bounds begin: Triton would
# compile anew while the engine serves.
@triton.jit(
    do_not_specialize=[
        "bounds_QS1",
        "stride_blocks_row",
        "stride_bounds_row",
        "num_spans",
        "num_parts",
    ]
)
def _span_lse(
    query_QHD, keys_BKND, blocks_QM, bounds_QS1, lse_QHSP, scale,
    stride_query_row, stride_query_head, stride_query_dim,
    stride_key_block, stride_key_head, stride_key_slot, stride_key_dim,
    stride_blocks_row, stride_blocks_column, stride_bounds_row, stride_bounds_span,
    num_spans, num_parts,
    SLOTS: tl.constexpr,  # of a block
    GROUP: tl.constexpr,  # query heads per key head
    SIZE: tl.constexpr,  # of a head
    PART: tl.constexpr,
    TILE: tl.constexpr,  # slots read at a time
    GROUP_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    row = tl.program_id(1).to(tl.int64)
    key_head = tl.program_id(2).to(tl.int64)

    bounds = bounds_QS1 + row * stride_bounds_row + span * stride_bounds_span
    start = tl.load(bounds).to(tl.int32) + part * PART
    end = tl.minimum(tl.load(bounds + stride_bounds_span).to(tl.int32), start + PART)

    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, SIZE_PADDED)
    query = query_QHD + row * stride_query_row + key_head * GROUP * stride_query_head
    query = tl.load(
        query + heads[:, None] * stride_query_head + dims[None, :] * stride_query_dim,
        mask=(heads[:, None] < GROUP) & (dims[None, :] < SIZE),
        other=0.0,
    )
    query = query.to(tl.float32) * scale

    peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    for first in range(start, end, TILE):
        slots = first + tl.arange(0, TILE)
        # Slots past the end are not even read: what lies there is anybody's.
        inside = slots < end
        blocks = blocks_QM + row * stride_blocks_row + (slots // SLOTS) * stride_blocks_column
        blocks = tl.load(blocks, mask=inside, other=0).to(tl.int64)
        keys = keys_BKND + key_head * stride_key_head + blocks * stride_key_block
        keys += (slots % SLOTS) * stride_key_slot
        keys = tl.load(
            keys[:, None] + dims[None, :] * stride_key_dim,
            mask=inside[:, None] & (dims[None, :] < SIZE),
            other=0.0,
        )
        logits = tl.sum(query[:, None, :] * keys.to(tl.float32)[None, :, :], axis=2)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        peak = higher

    # Of an empty span: -inf + log(0).
    num_heads = tl.num_programs(2) * GROUP
    out = (row * num_heads + key_head * GROUP + heads) * num_spans + span
    tl.store(lse_QHSP + out * num_parts + part, peak + tl.log(total), mask=heads < GROUP)


def span_lse_triton(
    query_QHD: torch.Tensor,
    cache_BKNC: torch.Tensor,
    read: KeyReader,
    blocks_QM: torch.Tensor,
    bounds_QS1: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Log-sum-exp of each query row's logits over consecutive spans of its keys, in float32.

    Arguments and result are those of :func:`vllm_flow.engine.worker.attention.keys.span_lse`; `read` must be one of
    :data:`vllm_flow.engine.worker.attention.keys.STRIDED`, and tensors be where Triton runs.
    """
    num_rows, num_heads, head_size = query_QHD.shape
    keys_BKND = STRIDED[read](cache_BKNC, head_size)
    num_key_heads, block_slots = keys_BKND.shape[1:3]
    num_spans = bounds_QS1.shape[1] - 1
    num_parts = triton.cdiv(blocks_QM.shape[1] * block_slots, PART)
    group = num_heads // num_key_heads
    lse_QHSP = torch.empty(
        (num_rows, num_heads, num_spans, num_parts), dtype=torch.float32, device=query_QHD.device
    )
    # Spans first: that dimension of a grid may be as large as it likes.
    _span_lse[(num_spans * num_parts, num_rows, num_key_heads)](
        query_QHD, keys_BKND, blocks_QM, bounds_QS1, lse_QHSP, scale,
        *query_QHD.stride(), *keys_BKND.stride(), *blocks_QM.stride(), *bounds_QS1.stride(),
        num_spans, num_parts,
        SLOTS=block_slots, GROUP=group, SIZE=head_size, PART=PART, **tile_of(group, head_size),
    )  # fmt: skip
    return lse_QHSP.squeeze(-1) if num_parts == 1 else lse_QHSP.logsumexp(-1)


def compile_for(attention: Any, read: KeyReader) -> None:
    """Compile the kernel as steps will call it for a layer with a cache, by one call for a row without keys."""
    cache_BKNC = cache_of(attention)
    device, dtype = cache_BKNC.device, getattr(attention, "dtype", cache_BKNC.dtype)
    shape = (1, attention.num_heads, attention.head_size)
    query_QHD = torch.zeros(shape, dtype=dtype, device=device)
    blocks_QM = torch.zeros(1, 1, dtype=torch.int64, device=device)
    bounds_QS1 = torch.zeros(1, 2, dtype=torch.int64, device=device)
    span_lse_triton(query_QHD, cache_BKNC, read, blocks_QM, bounds_QS1, attention.impl.scale)


def tile_of(group: int, head_size: int) -> dict[str, int]:
    """The kernel's shapes for `group` query heads per key head; Triton's are powers of two."""
    padded = [1 << (size - 1).bit_length() for size in (group, head_size)]
    return {
        "GROUP_PADDED": padded[0],
        "SIZE_PADDED": padded[1],
        "TILE": max(16, TILE_PRODUCTS // (padded[0] * padded[1])),
    }


def lse_function(kernel: Kernel, device: torch.device, read: KeyReader) -> SpanLse:
    """What computes the log-sum-exp for a cache on `device`: this kernel or its reference.

    "auto" takes the kernel on CUDA, wherever nothing stands against it; where something does, it says so.

    Raises:
        ValueError: "triton" was asked for, and something stands against it.
    """
    against = _against(device, read)
    if kernel == "triton" and against is not None:
        raise ValueError(
            f"the attention log cannot use attention_log_kernel='triton': {against}; leave it out."
        )
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return span_lse
    if against is None:
        return span_lse_triton
    logger.warning("The attention log gathers keys with torch instead of its kernel: %s.", against)
    return span_lse


def _against(device: torch.device, read: KeyReader) -> str | None:
    """What keeps the kernel from reading such a cache."""
    if not HAS_TRITON:
        return "vLLM finds no Triton that works here"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton compiles nothing for the device {device.type!r}"
    if read not in STRIDED:
        return f"the backend stores keys as {read.__name__}, out of the reach of strides"
    return None
