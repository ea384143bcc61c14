"""What a request stores where: its policy applied to its image spans. Integers only.

Knows layers, tokens and blocks; nothing of batches (that is `plan`), and neither torch nor vLLM.

A request's *packed position* of a kept token is its rank among the request's kept tokens: where its
key and value live in the block table once the image is gone. Terms, with a drawing: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans, IntArray


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where one request's tokens are stored, per layer: its policy applied to its image spans."""

    spans: ImageSpans
    cliff: int

    @classmethod
    def of(cls, policy: FlowPolicy | None, spans: ImageSpans) -> TokenLayout | None:
        """The layout, or None where nothing is ever evicted (no policy, or no image)."""
        if policy is None or spans.total == 0:
            return None
        return cls(spans, policy.cliff)

    def evicts_at(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based) sees no image token."""
        return layer >= self.cliff

    def stored_tokens(self, num_tokens: int, first_layer: int) -> int:
        """Slots that the first ``num_tokens`` tokens need in a storage group.

        Args:
            num_tokens: tokens of the request, prompt and output, from the start.
            first_layer: shallowest layer of the storage group. One layer before the cliff makes
                the whole group hold the image, since its layers share one block table.
        """
        if not self.evicts_at(first_layer):
            return num_tokens
        return num_tokens - self.spans.count_before(num_tokens)

    def stored_positions(self, positions: IntArray, layer: int) -> IntArray:
        """Slot in ``layer`` of the first stored token at or after each position, same shape."""
        if not self.evicts_at(layer):
            return positions
        return positions - self.spans.counts_before(positions)

    def block_positions(self, num_blocks: int, first_layer: int, block_size: int) -> IntArray:
        """Position of the first token that each of a request's first blocks serves, ascending.

        A prefix needs exactly the blocks whose position lies in it. A group with the cliff inside
        stores tokens by position for its layers before the cliff, which need a block the earlier.

        Args:
            first_layer: shallowest layer of the storage group.
        """
        slots = np.arange(num_blocks, dtype=np.int64) * block_size
        return self.spans.kept_positions(slots) if self.evicts_at(first_layer) else slots


@dataclass(frozen=True, slots=True)
class PackedBoundary:
    """What a prefix of whole blocks means for a storage group that keeps packed tokens.

    Seen from the prefix one block shorter, at most one packed block became full on the way and at
    most one is partly filled at the end, since a block of tokens keeps at most a block of them.
    """

    full_blocks: int
    """Packed blocks that hold kept tokens of the prefix only, and all they can."""
    completed: int | None
    """The packed block that became full since the prefix one block shorter, or, if the prefix ends in
    an image, the full one that it ends behind."""
    tail: int | None
    """The packed block that the prefix fills in part; its later slots are anybody's."""


def packed_boundary(layout: TokenLayout, num_blocks: int, block_size: int) -> PackedBoundary:
    """The packed blocks that a prefix of ``num_blocks`` whole blocks of tokens ends in."""

    def kept(blocks: int) -> int:
        tokens = blocks * block_size
        return tokens - layout.spans.count_before(tokens)

    before, now = kept(num_blocks - 1), kept(num_blocks)
    full = now // block_size
    tail = full if now % block_size else None
    became_full = full > before // block_size
    return PackedBoundary(
        full_blocks=full,
        completed=full - 1 if became_full or (full and tail is None) else None,
        tail=tail,
    )


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
    return max(required - len(idle), 0) + sum(idle) + copies


def storage_groups(num_layers: int, group_layers: int) -> tuple[int, ...]:
    """First layer of each storage group of ``group_layers`` consecutive layers.

    Raises:
        ValueError: ``group_layers`` does not divide ``num_layers``. vLLM pads unequal groups,
            which would waste the memory that eviction saves.
    """
    if group_layers < 1 or num_layers % group_layers:
        divisors = [str(d) for d in range(1, num_layers + 1) if num_layers % d == 0]
        raise ValueError(
            f"group_layers={group_layers} does not divide the model's {num_layers} decoder "
            f"layers; use one of {', '.join(divisors)}."
        )
    return tuple(range(0, num_layers, group_layers))


def default_group_layers(num_layers: int, max_groups: int = 8) -> int:
    """Smallest divisor of ``num_layers`` that makes at most ``max_groups`` storage groups.

    More groups save memory more finely, but each costs a block table and metadata per step.
    """
    divisors = (d for d in range(1, num_layers + 1) if num_layers % d == 0)
    return next(d for d in divisors if num_layers // d <= max_groups)


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
