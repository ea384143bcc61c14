"""How many KV blocks a request holds in each storage group, counted from its layout. Integers only.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_flow.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an engine stores keys and values."""

    num_layers: int
    group_starts: tuple[int, ...]
    """First layer of each storage group."""
    block_size: int
    """Tokens per KV block."""
    block_bytes: int
    """Bytes per KV block, all layers of its storage group and all workers together."""


def predict_blocks(
    num_tokens: int,
    layout: TokenLayout | None,
    group_starts: Sequence[int],
    block_size: int,
) -> tuple[int, ...]:
    """KV blocks a request holds in each storage group once ``num_tokens`` tokens are computed."""
    stored = (
        num_tokens if layout is None else layout.stored_tokens(num_tokens, start)
        for start in group_starts
    )
    return tuple(-(-tokens // block_size) for tokens in stored)


def stored_blocks(
    num_tokens: int,
    evicted: Iterable[tuple[int, int]],
    group_starts: Sequence[int],
    block_size: int,
) -> tuple[int, ...]:
    """:func:`predict_blocks` where the whole prompt is computed, and so only counts matter.

    Args:
        evicted: :meth:`TokenLayout.evicted_tokens`.
    """
    evicted = tuple(evicted)
    return tuple(
        -(-(num_tokens - evicted_at(evicted, start)) // block_size) for start in group_starts
    )


def evicted_at(evicted: Iterable[tuple[int, int]], layer: int) -> int:
    """Image tokens that are gone in a layer, from :meth:`TokenLayout.evicted_tokens`."""
    return max((tokens for first, tokens in evicted if first <= layer), default=0)
