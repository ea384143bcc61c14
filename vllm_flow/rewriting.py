"""What moves when images leave after the prefill: rows of the prompt, from their positions to packed ones.

A storage group past a stage then holds the prompt in other blocks: those wholly before the first token
that leaves stay, the rest is copied, row by row, into blocks of its own. Integers only; imports neither
torch nor vLLM. Who allocates is `engine/storage`, who copies `engine/moving`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_flow.layout import TokenLayout
from vllm_flow.spans import IntArray


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One request's blocks in one storage group, before its images left and after."""

    kept: int
    """Blocks at the start of both that are the same."""
    old: tuple[int, ...]
    """Ids of the blocks behind them, by position."""
    new: tuple[int, ...]
    """Ids of those that take their place."""


@dataclass(frozen=True, slots=True)
class Need:
    """Blocks that a rewrite takes from the pool."""

    kept: int
    """See :attr:`Rewrite.kept`."""
    new: int
    """Blocks written anew."""
    net: int
    """Free blocks that there must be, when what the request held alone is given back first."""


def is_rewritten(layout: TokenLayout, last_layer: int) -> bool:
    """Whether a storage group that ends with ``last_layer`` holds less after the prompt than in it."""
    gone = layout.evicted(last_layer)
    return layout.late and gone is not None and gone.total > 0


def need(
    layout: TokenLayout,
    first_layer: int,
    last_layer: int,
    num_tokens: int,
    block_size: int,
    uses: Sequence[int],
) -> Need:
    """What it takes to have room for ``num_tokens`` tokens, of which the prompt is computed.

    Args:
        first_layer, last_layer: of a storage group that is rewritten.
        uses: of each block that the request holds, how many requests hold it.
    """
    gone = layout.evicted(last_layer)
    assert gone is not None and gone.total
    kept = gone.ranges[0][0] // block_size
    new = -(-layout.stored_tokens(num_tokens, first_layer) // block_size) - kept
    returned = sum(count == 1 for count in uses[kept:])
    return Need(kept, new, max(new - returned, 0))


def moved_slots(
    layout: TokenLayout, layer: int, rewrite: Rewrite, block_size: int
) -> tuple[IntArray, IntArray]:
    """[R] slots from which and to which a layer's rows of the prompt move; those in kept blocks do not.

    A slot is a block's id times ``block_size`` plus the place in the block.
    """
    gone = layout.evicted(layer)
    first, missing = rewrite.kept * block_size, 0 if gone is None else gone.total
    targets = np.arange(first, layout.prompt_tokens - missing, dtype=np.int64)
    sources = targets if gone is None else gone.kept_positions(targets)
    return _slots(sources - first, rewrite.old, block_size), _slots(
        targets - first, rewrite.new, block_size
    )


def _slots(places: IntArray, blocks: Sequence[int], block_size: int) -> IntArray:
    found: IntArray = np.array(blocks, dtype=np.int64)[places // block_size] * block_size
    return found + places % block_size


def overlap(rewrites: Iterable[Rewrite]) -> bool:
    """Whether a block that one of them reads is written by one of them.

    Blocks are given back before others are taken, so a full pool gives the same ones again.
    """
    found = tuple(rewrites)
    read = {block for rewrite in found for block in rewrite.old}
    return any(block in read for rewrite in found for block in rewrite.new)
