"""Prefix caching for requests that evict: found by the same policy, never by another.

Seams: ``KVCacheManager.get_computed_blocks`` for the look-up, ``cache_salt`` for the separation.
vLLM puts the salt into a request's first block hash, and every later hash builds on it, so a salt
per policy gives each policy a hash chain of its own. Terms, with a drawing: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from vllm_flow.engine.storage import COMPLETED, POSITION, TAIL, FlowAttentionManager
from vllm_flow.layout import PackedBoundary, TokenLayout, packed_boundary

SALT_MARK = "\x00vllm-flow"
"""Begins every policy's salt. Clients may not send it, or they could read a policy's blocks."""


def policy_salt(cache_salt: str | None, layout: TokenLayout) -> str:
    """The salt of a request that evicts; keeps apart what the client's own salt kept apart."""
    return f"{SALT_MARK}\x00cliff={layout.cliff}\x00{cache_salt or ''}"


class FlowKVCacheManager(KVCacheManager):
    """vLLM's manager, which looks prefixes of requests with a layout up by the layout."""

    flow_layouts: Mapping[str, TokenLayout]
    flow_managers: Sequence[FlowAttentionManager]
    flow_in_flight: set[BlockHash]
    """Prefixes of requests with a layout that the step being scheduled will compute."""

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        layout = self._searchable_layout(request)
        if layout is None:
            return super().get_computed_blocks(request)
        blocks, num_tokens = self._longest_hit(request, layout)
        return self.create_kv_cache_blocks(blocks), num_tokens, 0

    def has_prefix_in_flight(self, request: Request) -> bool:
        """Whether the next step would find a longer prefix of a new request than this one does.

        Stock vLLM lets requests of one step share what that step computes. Packed blocks cannot be
        shared so early, as the tail of a hit is copied before the forward pass.
        """
        layout = self._searchable_layout(request)
        if layout is None or not self.flow_in_flight or request.num_computed_tokens:
            return False
        limit = (request.num_tokens - 1) // self.flow_managers[0].block_size
        coming = next(
            (
                num_blocks
                for num_blocks in range(min(limit, len(request.block_hashes)), 0, -1)
                if request.block_hashes[num_blocks - 1] in self.flow_in_flight
            ),
            0,
        )
        return coming > 0 and (
            coming * self.flow_managers[0].block_size > self._longest_hit(request, layout)[1]
        )

    def _searchable_layout(self, request: Request) -> TokenLayout | None:
        if not self.prefix_cache_lookup_enabled(request):
            return None
        return self.flow_layouts.get(request.request_id)

    def _longest_hit(
        self, request: Request, layout: TokenLayout
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        # The last token is computed anew for its logits, as in stock vLLM.
        return longest_hit(request.block_hashes, request.num_tokens - 1, layout, self.flow_managers)


def longest_hit(
    block_hashes: Sequence[BlockHash],
    max_tokens: int,
    layout: TokenLayout,
    managers: Sequence[FlowAttentionManager],
) -> tuple[tuple[list[KVCacheBlock], ...], int]:
    """The longest prefix whose blocks every storage group still holds.

    Args:
        block_hashes: hash of each whole block of the request's tokens, chained.
        max_tokens: longest admissible hit.
        layout: where the request's tokens are stored.

    Returns:
        Blocks per group and the hit's length in tokens, a multiple of the block size.
    """
    block_size = managers[0].block_size
    groups = [_GroupHit(manager, layout) for manager in managers]
    best: tuple[list[KVCacheBlock], ...] = tuple([] for _ in managers)
    best_tokens = 0
    for num_blocks, prefix in enumerate(block_hashes[: max_tokens // block_size], start=1):
        boundary = packed_boundary(layout, num_blocks, block_size)
        if not all(group.extend(prefix, boundary) for group in groups):
            break  # what is missing is part of every longer prefix too
        held = [group.blocks() for group in groups]
        if all(blocks is not None for blocks in held):
            best, best_tokens = tuple(held), num_blocks * block_size
    return best, best_tokens


class _GroupHit:
    """One storage group's part of a hit, grown block by block of tokens."""

    def __init__(self, manager: FlowAttentionManager, layout: TokenLayout) -> None:
        self._manager = manager
        self._by_position = not layout.evicts_at(manager.spec.first_layer)
        self._by_rank = layout.evicts_at(manager.spec.last_layer)
        self._positions: list[KVCacheBlock] = []
        self._ranks: list[KVCacheBlock] = []
        self._tail: list[KVCacheBlock] | None = []

    def extend(self, prefix: BlockHash, boundary: PackedBoundary) -> bool:
        """Look one more block of tokens up; False if no longer prefix can be a hit."""
        find = self._manager.find_cached
        if self._by_position:
            block = find(prefix, POSITION)
            if block is None:
                return False
            self._positions.append(block)
        if self._by_rank:
            if boundary.completed is not None:
                block = find(prefix, COMPLETED)
                if block is None:
                    return False
                self._ranks.append(block)
            self._tail = []
            if boundary.tail is not None:
                block = find(prefix, TAIL)
                self._tail = None if block is None else [block]
        return True

    def blocks(self) -> list[KVCacheBlock] | None:
        """The blocks of the prefix so far, None if it ends in a packed block that is gone."""
        if self._tail is None:
            return None
        ranks = self._ranks + self._tail
        # In a mixed group, blocks past the packed ones matter by position alone.
        return ranks + self._positions[len(ranks) :]
