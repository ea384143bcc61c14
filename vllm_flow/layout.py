"""What a request stores where: its policy applied to its image spans. Integers only.

Knows layers, tokens and blocks; nothing of batches (that is `plan`), and neither torch nor vLLM.

A request's *packed position* of a kept token is its rank among the request's kept tokens: where its
key and value live in the block table once the image is gone. Terms, with a drawing: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class PackedBoundary:
    """What a prefix of whole blocks means for a storage group that keeps packed tokens.

    Seen from the prefix one block shorter, at most one packed block became full on the way and at
    most one is partly filled at the end, since a block of tokens keeps at most a block of them.
    """

    full_blocks: int
    """Packed blocks that hold kept tokens of the prefix only, and all they can."""
    completed: int | None
    """The packed block that became full since the prefix one block shorter."""
    tail: int | None
    """The packed block that the prefix fills in part; its later slots are anybody's."""


def packed_boundary(layout: TokenLayout, num_blocks: int, block_size: int) -> PackedBoundary:
    """The packed blocks that a prefix of ``num_blocks`` whole blocks of tokens ends in."""

    def kept(blocks: int) -> int:
        tokens = blocks * block_size
        return tokens - layout.spans.count_before(tokens)

    before, now = kept(num_blocks - 1), kept(num_blocks)
    full = now // block_size
    return PackedBoundary(
        full_blocks=full,
        completed=full - 1 if full > before // block_size else None,
        tail=full if now % block_size else None,
    )


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
