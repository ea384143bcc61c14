"""The longest prefix of a request that evicts whose blocks every storage group still holds.

Knows keys and the managers that find blocks by them, not requests. Under which keys blocks are found: `findable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_flow.engine.core.cache_keys import POSITION, completed, find_until_gone, tail
from vllm_flow.engine.core.findable import FindableBlocks
from vllm_flow.engine.core.prefix_keys import Prefixes
from vllm_flow.engine.core.state_blocks import FlowStateManager
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
    of_groups: Sequence[FindableBlocks],
    of_states: Sequence[FlowStateManager] = (),
) -> Hit:
    """The longest prefix whose blocks every storage group still holds, and its states, where there are some.

    There are two passes, so that the number of look-ups is about that of the prefix's blocks. The first goes from the
    start on, over blocks that longer prefixes need as well, up to the first that is gone. The second goes back from
    there, over blocks that only a prefix which ends just there needs (tails, states), down to one that has them all.

    Args:
        block_hashes: hash of each whole block of the request's tokens, chained.
        max_tokens: longest admissible hit.
        layout: where the request's tokens are stored.
    """
    block_size = of_groups[0].block_size
    reach = min(layout.findable(max_tokens) // block_size, len(block_hashes))
    groups = [_GroupHit(manager, layout) for manager in of_groups]
    for group in groups:
        reach = group.look_positions_up(block_hashes, reach)
    prefixes = Prefixes(block_hashes, layout, block_size, 0, reach)
    for group in groups:
        reach = group.look_packed_up(prefixes, reach)
    best: list[list[KVCacheBlock]] = [[] for _ in (*of_groups, *of_states)]
    best_tokens = without_states = 0
    for num_blocks in range(reach, 0, -1):
        # A prefix of evicted tokens alone has no block: it would be "found" in a cold cache.
        if not prefixes.ends(num_blocks) or not any(group.holds(num_blocks) for group in groups):
            continue
        key = prefixes.key(num_blocks)
        if not all(group.ends(num_blocks, key) for group in groups):
            continue
        without_states = without_states or num_blocks * block_size
        states = [state for m in of_states for state in [m.find_state(key)] if state is not None]
        if len(states) == len(of_states):
            passed = [of_groups[0].pool.null_block] * (num_blocks - 1)
            best = [group.blocks(num_blocks) for group in groups]
            best += [[*passed, state] for state in states]
            best_tokens = num_blocks * block_size
            break
    by_group = sorted(
        zip(
            [*(m.group for m in of_groups), *(m.kv_cache_group_id for m in of_states)],
            best,
            strict=True,
        ),
        key=itemgetter(0),
    )
    return Hit(tuple(blocks for _, blocks in by_group), best_tokens, without_states)


def lacks(
    block_hashes: Sequence[BlockHash],
    num_blocks: int,
    layout: TokenLayout,
    of_groups: Sequence[FindableBlocks],
) -> bool:
    """Whether a block is gone that the last of ``num_blocks`` whole blocks of tokens has filled.

    Then no hit is that long. The number of look-ups does not depend on the prefix's length.
    """
    size = of_groups[0].block_size
    key = Prefixes(block_hashes, layout, size, num_blocks - 1, num_blocks).key(num_blocks)

    def fills(stage: LayoutStage) -> bool:
        tokens, before = num_blocks * size, (num_blocks - 1) * size
        left, left_before = (n - stage.evicted.count_before(n) for n in (tokens, before))
        return left // size > left_before // size

    for manager in of_groups:
        by_position = not layout.evicts_at(manager.spec.first_layer)
        if by_position and manager.find_cached(block_hashes[num_blocks - 1], POSITION) is None:
            return True
        for stage in manager.stages(layout):
            if fills(stage) and manager.find_cached(key, completed(stage)) is None:
                return True
    return False


class _GroupHit:
    """One storage group's part of a hit."""

    def __init__(self, manager: FindableBlocks, layout: TokenLayout) -> None:
        self._manager, self._layout = manager, layout
        self._by_position = not layout.evicts_at(manager.spec.first_layer)
        self._positions: list[KVCacheBlock] = []
        self._stages: list[_StageHit] = []

    def look_positions_up(self, block_hashes: Sequence[BlockHash], reach: int) -> int:
        """Whole blocks of tokens, of the first ``reach``, that are there by position, if they have to."""
        if not self._by_position:
            return reach
        self._positions = find_until_gone(
            self._manager.pool,
            islice(block_hashes, reach),
            POSITION,
            self._manager.group,
        )
        return len(self._positions)

    def look_packed_up(self, prefixes: Prefixes, reach: int) -> int:
        """Of the first ``reach`` blocks of tokens, those whose packed blocks are there."""
        for stage in self._manager.stages(self._layout):
            self._stages.append(_StageHit(self._manager, stage, prefixes))
            reach = self._stages[-1].look_up(reach)
        return reach

    def holds(self, num_blocks: int) -> bool:
        """Whether a prefix has blocks here at all."""
        return self._by_position or any(stage.holds(num_blocks) for stage in self._stages)

    def ends(self, num_blocks: int, key: BlockHash) -> bool:
        """Whether a prefix can end here, if all blocks that it has filled are there: its last blocks are there, too.

        Args:
            key: what its packed blocks are found by.
        """
        return all(stage.ends(num_blocks, key) for stage in self._stages)

    def blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """The blocks of a prefix that ends here."""
        held: list[KVCacheBlock] = []
        # Deeper stages keep fewer tokens, so a block that the deepest stage has filled is full for the others, too.
        # The blocks behind those matter to shallower stages alone, and the last ones only by position.
        for stage in reversed(self._stages):
            held += stage.blocks(num_blocks)[len(held) :]
        return held + self._positions[len(held) : num_blocks]


class _StageHit:
    """The packed blocks of one stage in a group's part of a hit."""

    def __init__(self, manager: FindableBlocks, stage: LayoutStage, prefixes: Prefixes) -> None:
        self._manager, self._stage, self._prefixes = manager, stage, prefixes
        self._boundaries = prefixes.boundaries(stage)
        self._full: list[KVCacheBlock] = []
        self._tail: KVCacheBlock | None = None

    def look_up(self, reach: int) -> int:
        """See :meth:`_GroupHit.look_packed_up`."""
        filling = self._prefixes.filling(self._stage)
        self._full = find_until_gone(
            self._manager.pool,
            (key for num_blocks, key in filling if num_blocks <= reach),
            completed(self._stage),
            self._manager.group,
        )
        if len(self._full) < len(filling):
            reach = min(reach, filling[len(self._full)][0] - 1)
        return reach

    def holds(self, num_blocks: int) -> bool:
        boundary = self._boundaries[num_blocks - 1]
        return boundary.full_blocks > 0 or boundary.tail is not None

    def ends(self, num_blocks: int, key: BlockHash) -> bool:
        boundary, self._tail = self._boundaries[num_blocks - 1], None
        if boundary.tail is not None:
            self._tail = self._manager.find_cached(key, tail(self._stage))
            return self._tail is not None
        if boundary.completed is None or self._fills(num_blocks):
            return True
        # Evicted tokens alone were added: known only if somebody had just these.
        return self._manager.find_cached(key, completed(self._stage)) is not None

    def _fills(self, num_blocks: int) -> bool:
        """Whether the prefix's last block of tokens filled a packed one, which was looked up then."""
        before = self._boundaries[num_blocks - 2].full_blocks if num_blocks > 1 else 0
        return self._boundaries[num_blocks - 1].full_blocks > before

    def blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        full = self._full[: self._boundaries[num_blocks - 1].full_blocks]
        return full if self._tail is None else [*full, self._tail]
