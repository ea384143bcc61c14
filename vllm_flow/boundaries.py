"""Works out what a prefix of whole blocks of tokens ends in, and what a hit costs. Integers only.

Knows tokens and blocks, not pools; imports neither torch nor vLLM. Terms, with a drawing:
docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_flow.spans import ImageSpans


class PackedBoundary(NamedTuple):
    """What a prefix of whole blocks means for layers that keep packed tokens.

    Seen from the prefix one block shorter, at most one packed block became full on the way and at
    most one is partly filled at the end, since a block of tokens keeps at most a block of them.
    """

    full_blocks: int
    """Packed blocks that hold kept tokens of the prefix only, and all they can."""
    completed: int | None
    """The packed block that became full since the prefix one block shorter, or, if the prefix ends in
    evicted tokens, the full one that it ends behind."""
    tail: int | None
    """The packed block that the prefix fills in part; its later slots are anybody's."""


def packed_boundaries(
    evicted: ImageSpans, first: int, last: int, block_size: int
) -> list[PackedBoundary]:
    """The packed blocks that prefixes of ``first`` ... ``last`` whole blocks of tokens end in, in this order.

    Args:
        evicted: what is gone in the layers that are meant.
    """
    tokens = np.arange(first - 1, last + 1, dtype=np.int64) * block_size
    full, rest = np.divmod(tokens - evicted.counts_before(tokens), block_size)
    return [
        PackedBoundary(
            full_blocks=now,
            completed=now - 1 if now > before or (now and not left) else None,
            tail=now if left else None,
        )
        for before, now, left in zip(
            full[:-1].tolist(), full[1:].tolist(), rest[1:].tolist(), strict=True
        )
    ]


def packed_boundary(evicted: ImageSpans, num_blocks: int, block_size: int) -> PackedBoundary:
    """:func:`packed_boundaries` of one prefix."""
    return packed_boundaries(evicted, num_blocks, num_blocks, block_size)[0]


def blocks_taken(required: int, idle: Sequence[bool], shared: int, *, take_over: bool) -> int:
    """Free blocks that a request admitted on a prefix hit takes from the pool in one group.

    A block of the hit that nobody holds counts as free, so a hit never takes more than no hit
    would, unless blocks that the request will write are copied: then the copy comes on top.

    Args:
        required: blocks the request holds in the end; as many as the hit has, or more.
        idle: per block of the hit, whether nobody holds it.
        shared: blocks of the hit, from its start, that are never written again.
        take_over: write idle blocks in their place instead of in a copy.
    """
    written = list(idle[shared:])
    copies = written.count(False) if take_over else len(written)
    return required - len(idle) + sum(idle) + copies
