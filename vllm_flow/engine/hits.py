"""The longest prefix of a request that evicts whose blocks every storage group still holds.

Knows keys and the managers that find blocks by them, not requests. Under which keys blocks are found: `findable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_flow.engine.cache_keys import POSITION, completed, tail
from vllm_flow.engine.prefix_keys import Prefixes
from vllm_flow.engine.state_blocks import FlowStateManager
from vllm_flow.engine.storage import FlowAttentionManager
from vllm_flow.layout import TokenLayout
from vllm_flow.layout_stages import LayoutStage


class Hit(NamedTuple):
    """A prefix that is there already."""

    blocks: tuple[list[KVCacheBlock], ...]
    """Per KV-cache group."""
    tokens: int
    """Its length, a multiple of the block size."""
    without_states: int
    """Length of the prefix that would be there, were it not for states."""


def longest_hit(
    block_hashes: Sequence[BlockHash],
    max_tokens: int,
    layout: TokenLayout,
    managers: Sequence[FlowAttentionManager],
    of_states: Sequence[FlowStateManager] = (),
) -> Hit:
    """The longest prefix whose blocks every storage group still holds, and its states, where there are some.

    Args:
        block_hashes: hash of each whole block of the request's tokens, chained.
        max_tokens: longest admissible hit.
        layout: where the request's tokens are stored.
    """
    block_size = managers[0].block_size
    longest = min(layout.findable(max_tokens) // block_size, len(block_hashes))
    prefixes = Prefixes(block_hashes, layout, block_size, 0, longest)
    groups = [_GroupHit(manager, prefixes) for manager in managers]
    best: list[list[KVCacheBlock]] = [[] for _ in (*managers, *of_states)]
    best_tokens = without_states = 0
    for num_blocks in range(1, longest + 1):
        key, ends = prefixes.key(num_blocks), prefixes.ends(num_blocks)
        if not all(
            group.extend(block_hashes[num_blocks - 1], key, num_blocks, ends) for group in groups
        ):
            break  # what is missing is part of every longer prefix too
        if not ends:
            continue
        held = [group.blocks() for group in groups]
        # A prefix of evicted tokens alone has no block: it would be "found" in a cold cache.
        if not any(held) or any(blocks is None for blocks in held):
            continue
        without_states = num_blocks * block_size
        held += [manager.find_cached(key, num_blocks) for manager in of_states]
        if all(blocks is not None for blocks in held):
            best, best_tokens = held, without_states
    by_group = sorted(
        zip((m.kv_cache_group_id for m in (*managers, *of_states)), best, strict=True),
        key=itemgetter(0),
    )
    return Hit(tuple(blocks for _, blocks in by_group), best_tokens, without_states)


class _GroupHit:
    """One storage group's part of a hit, grown block by block of tokens."""

    def __init__(self, manager: FlowAttentionManager, prefixes: Prefixes) -> None:
        self._manager = manager
        layout = prefixes.layout
        self._by_position = not layout.evicts_at(manager.spec.first_layer)
        self._positions: list[KVCacheBlock] = []
        self._by_rank = [_StageHit(manager, stage, prefixes) for stage in manager.stages(layout)]

    def extend(self, prefix: BlockHash, key: BlockHash, num_blocks: int, ends: bool) -> bool:
        """Look one more block of tokens up; False if no longer prefix can be a hit.

        Args:
            prefix: what blocks by position are found by.
            key: what packed blocks are found by.
            ends: whether a prefix of ``num_blocks`` may end here.
        """
        if self._by_position:
            block = self._manager.find_cached(prefix, POSITION)
            if block is None:
                return False
            self._positions.append(block)
        return all(stage.extend(key, num_blocks, ends) for stage in self._by_rank)

    def blocks(self) -> list[KVCacheBlock] | None:
        """The blocks of the prefix so far, None if nothing here is known to end it."""
        held: list[KVCacheBlock] = []
        # A block that the deepest stage has filled was filled for the others before; past those,
        # blocks matter to the shallower stages alone, and then by position.
        for stage in reversed(self._by_rank):
            own = stage.blocks()
            if own is None:
                return None
            held += own[len(held) :]
        return held + self._positions[len(held) :]


class _StageHit:
    """The packed blocks of one stage in a group's part of a hit."""

    def __init__(
        self, manager: FlowAttentionManager, stage: LayoutStage, prefixes: Prefixes
    ) -> None:
        self._find, self._stage, self._prefixes = manager.find_cached, stage, prefixes
        self._ranks: list[KVCacheBlock] = []
        self._tail: list[KVCacheBlock] | None = []

    def extend(self, prefix: BlockHash, num_blocks: int, ends: bool) -> bool:
        boundary = self._prefixes.boundaries(self._stage)[num_blocks - 1]
        ended = True
        if boundary.completed is not None:
            block = self._find(prefix, completed(self._stage))
            if boundary.full_blocks == len(self._ranks):
                # Evicted tokens alone were added: known only if somebody had just these.
                ended = block is not None
            elif block is None:
                return False
            else:
                self._ranks.append(block)
        self._tail = [] if ended else None
        if boundary.tail is not None:
            block = self._find(prefix, tail(self._stage)) if ends else None
            self._tail = None if block is None else [block]
        return True

    def blocks(self) -> list[KVCacheBlock] | None:
        return None if self._tail is None else self._ranks + self._tail
