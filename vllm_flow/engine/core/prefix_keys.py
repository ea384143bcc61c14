"""The prefix-cache keys of one request, computed once for all of its storage groups.

Knows a request's hashes and layout, not pools. What is found by a key: `cache_keys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_flow.boundaries import PackedBoundary, packed_boundaries
from vllm_flow.layout import TokenLayout
from vllm_flow.layout_stages import LayoutStage


class PackedNames(NamedTuple):
    """A packed block, and the prefixes that name it as completed, or as the one that they fill in part."""

    index: int
    """The block's place among the request's packed blocks."""
    is_full: bool
    keys: list[BlockHash]
    num_blocks: int
    """Whole blocks of tokens of the first of these prefixes."""


class Prefixes:
    """A request's prefixes of ``first`` + 1 ... ``last`` whole blocks of tokens.

    Args:
        block_hashes: hash of each whole block of the request's tokens, chained.
        barred: name the blocks that prefixes fill in part at which none may end, too. Nobody looks these names up;
            who is told of KV-cache events is told by them how long longer prefixes stand.
    """

    def __init__(
        self,
        block_hashes: Sequence[BlockHash],
        layout: TokenLayout,
        block_size: int,
        first: int,
        last: int,
        barred: bool = False,
    ) -> None:
        self.layout, self.first, self.last = layout, first, max(first, last)
        self.block_size, self._barred = block_size, barred
        self._hashes = block_hashes
        self._boundaries: dict[int, list[PackedBoundary]] = {}
        self._packed: dict[int, list[PackedNames]] = {}
        self._filling: dict[int, list[tuple[int, BlockHash]]] = {}

    def key(self, num_blocks: int) -> BlockHash:
        """What the packed blocks of a prefix are found by."""
        return BlockHash(
            self.layout.key(self._hashes[num_blocks - 1], num_blocks * self.block_size)
        )

    def ends(self, num_blocks: int) -> bool:
        """Whether a prefix may end there; else none does, though longer ones go through."""
        return self.layout.may_end_at(num_blocks * self.block_size)

    @cached_property
    def named(self) -> list[tuple[int, BlockHash, bool]]:
        """Of each: its blocks of tokens, its key, whether it may end there."""
        return [(n, self.key(n), self.ends(n)) for n in range(self.first + 1, self.last + 1)]

    def boundaries(self, stage: LayoutStage) -> Sequence[PackedBoundary]:
        """Of each, the packed blocks that it ends in where a stage has begun."""
        if stage.layer not in self._boundaries:
            self._boundaries[stage.layer] = packed_boundaries(
                stage.evicted, self.first + 1, self.last, self.block_size
            )
        return self._boundaries[stage.layer]

    def filling(self, stage: LayoutStage) -> Sequence[tuple[int, BlockHash]]:
        """Of each packed block that one of them fills: its whole blocks of tokens, and its key."""
        if stage.layer not in self._filling:
            ends = [boundary.full_blocks for boundary in self.boundaries(stage)]
            before = [self._full_before(stage), *ends[:-1]] if ends else []
            self._filling[stage.layer] = [
                (n, self.key(n))
                for n, (full, last) in enumerate(zip(ends, before, strict=True), self.first + 1)
                if full > last
            ]
        return self._filling[stage.layer]

    def _full_before(self, stage: LayoutStage) -> int:
        tokens = self.first * self.block_size
        return (tokens - stage.evicted.count_before(tokens)) // self.block_size

    def packed(self, stage: LayoutStage) -> Sequence[PackedNames]:
        """What names packed blocks, the same in every storage group that the stage is in."""
        if stage.layer not in self._packed:
            found: dict[tuple[int, bool], PackedNames] = {}
            for (n, key, ends), boundary in zip(self.named, self.boundaries(stage), strict=True):
                for index, is_full in ((boundary.completed, True), (boundary.tail, False)):
                    if index is not None and (is_full or ends or self._barred):
                        names = found.setdefault(
                            (index, is_full), PackedNames(index, is_full, [], n)
                        )
                        names.keys.append(key)
            self._packed[stage.layer] = list(found.values())
        return self._packed[stage.layer]
