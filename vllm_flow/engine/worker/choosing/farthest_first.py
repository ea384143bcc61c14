"""Farthest first as one Triton kernel: a loop on the device instead of some launches per token.

Same result as :func:`vllm_flow.ranks.diversity.farthest_first`, its reference, whose launches would take
longer than a short prompt's prefill. Knows neither requests nor layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton

from vllm_flow.ranks import PictureRank
from vllm_flow.ranks.diversity import DIVERSITY
from vllm_flow.ranks.unlike import AT_ONCE, distances, unit

BLOCKS = {1024: 4, AT_ONCE: 8}
"""Most tokens of a compiled variant, and its warps: few, so that all are there before a request is."""


@triton.jit(do_not_specialize=["stride", "tokens", "keep"])
def _farthest_first(
    distance_NN,
    apart_N,  # distance to the nearest other token
    chosen_K,
    stride,
    tokens,
    keep,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at < tokens
    never = -float("inf")
    apart = tl.load(apart_N + at, mask=inside, other=never)
    for index in range(keep):
        best = tl.argmax(apart, 0)  # the first of equals
        tl.store(chosen_K + index, best.to(tl.int64))
        row = tl.load(distance_NN + best.to(tl.int64) * stride + at, mask=inside, other=never)
        apart = tl.where(index == 0, row, tl.minimum(apart, row))
        # However alike all others are, what is chosen is never the farthest again.
        apart = tl.where(at == best, never, apart)


def farthest_first_triton(embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
    """As :func:`vllm_flow.ranks.diversity.farthest_first`."""
    distance_NN, apart_N = distances(unit(embeddings_NH))
    chosen_K = torch.empty(keep, dtype=torch.int64, device=embeddings_NH.device)
    tokens = len(distance_NN)
    block = next(block for block in BLOCKS if tokens <= block)
    _farthest_first[(1,)](
        distance_NN,
        apart_N,
        chosen_K,
        distance_NN.stride(0),
        tokens,
        keep,
        BLOCK=block,
        num_warps=BLOCKS[block],
    )
    return chosen_K


def compile_all(device: torch.device) -> None:
    """Compile every variant of the kernel; nothing where it does not run."""
    if fast_order(DIVERSITY, device) is DIVERSITY.order:
        return
    smaller = 0
    for block in BLOCKS:
        farthest_first_triton(torch.ones(smaller + 1, 1, device=device), 1)
        smaller = block


def fast_order(
    rank: PictureRank, device: torch.device
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """How a rank puts a picture's tokens in order on a device."""
    if rank is not DIVERSITY or device.type != "cuda" or not HAS_TRITON:
        return rank.order

    def order(embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
        small = len(embeddings_NH) <= AT_ONCE  # of which all distances are held
        return (farthest_first_triton if small else rank.order)(embeddings_NH, keep)

    return order
