"""How unlike tokens are: one minus the cosine, in float32, without all pairs of a long video in memory at once.

vLLM sizes its KV cache by what a forward pass takes, in which no rank takes part: what ranks take must stay below
that, whatever a client sends.

Legend: N tokens of an image, H width of the decoder's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AT_ONCE = 4096
"""Tokens of which all pairs are held: 64 MiB of distances."""

SAME_PRODUCT = 8
"""Rows of the smallest product: of fewer, equal columns may be summed in another order, and then differ."""


def unit(embeddings_NH: torch.Tensor) -> torch.Tensor:
    """Each row at length 1, a copy in float32."""
    tokens_NH = embeddings_NH.float()
    if tokens_NH.dtype == embeddings_NH.dtype:  # the very same memory
        tokens_NH = tokens_NH.clone()
    tokens_NH /= tokens_NH.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return tokens_NH


def distances(tokens_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, N] distances of unit tokens, infinite from each to itself; and [N] how far the nearest other one is."""
    distance_NN = (tokens_NH @ tokens_NH.T).neg_().add_(1).fill_diagonal_(float("inf"))
    return distance_NN, distance_NN.min(0).values


def nearest_other(tokens_NH: torch.Tensor) -> torch.Tensor:
    """[N] the second of :func:`distances`, without the first."""
    tokens = len(tokens_NH)
    apart_N = tokens_NH.new_full((tokens,), float("inf"))
    for rows in row_blocks(tokens, tokens):
        distance_BN = (tokens_NH[rows] @ tokens_NH.T).neg_().add_(1)
        distance_BN.diagonal(rows.start).fill_(float("inf"))
        apart_N = apart_N.minimum(distance_BN.min(0).values)
    return apart_N


def distances_from(tokens_NH: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """[N] how far the token at a place ([1], on the device) is from each."""
    alike_N = (tokens_NH.index_select(0, token.expand(SAME_PRODUCT)) @ tokens_NH.T)[0]
    return 1 - alike_N


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of as many rows each, which cover all: a block has no more pairs than :data:`AT_ONCE` tokens have.

    The last one reaches back into the one before, so that products of all blocks are computed alike.
    """
    size = min(rows, max(SAME_PRODUCT, AT_ONCE * AT_ONCE // max(columns, 1)))
    for start in range(0, rows, max(size, 1)):
        yield slice(min(start, rows - size), min(start, rows - size) + size)
