"""The order in which a request's blocks go back: all storage groups lose the same tail first.

vLLM frees group by group, in each group the last block first, and the pool evicts what was freed first. So the first
group would lose its whole chain of blocks before the second one lost a single block. But a prefix is found only as
far as every group still has it. Knows block positions, not pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from operator import itemgetter
from typing import TypeVar

from vllm_flow.layout import TokenLayout

T = TypeVar("T")


def by_position(
    groups: Sequence[Sequence[T]],
    layout: TokenLayout | None,
    group_starts: Sequence[int],
    block_size: int,
    of_states: Sequence[Sequence[T]] = (),
) -> list[T]:
    """A request's blocks by the first token that each serves, those of one token by group.

    Args:
        groups: blocks per storage group, in the order of its block table.
        layout: where the request's tokens are stored, None where it evicts nothing.
        group_starts: shallowest layer of each group.
        of_states: blocks per group of states: one of them is what a prefix of so many blocks of tokens needs.
    """
    if layout is None and len({len(blocks) for blocks in (*groups, *of_states)}) == 1:
        return list(chain.from_iterable(zip(*groups, *of_states, strict=True)))
    found: dict[tuple[int, int], Sequence[int]] = {}

    def positions(num_blocks: int, start: int) -> Sequence[int]:
        # Groups of one stage store the same tokens.
        stage = 0 if layout is None else layout.stage_at(start)
        if (stage, num_blocks) not in found:
            found[stage, num_blocks] = _positions(num_blocks, layout, start, block_size)
        return found[stage, num_blocks]

    keyed = [
        zip(positions(len(blocks), start), blocks, strict=True)
        for blocks, start in zip(groups, group_starts, strict=True)
    ]
    keyed += [zip(count(0, block_size), blocks, strict=False) for blocks in of_states]
    # Stable, and so by group among equals; a block cannot be compared.
    return [block for _, block in sorted(chain.from_iterable(keyed), key=itemgetter(0))]


def _positions(
    num_blocks: int, layout: TokenLayout | None, first_layer: int, block_size: int
) -> Sequence[int]:
    if layout is None:
        return range(0, num_blocks * block_size, block_size)
    positions: list[int] = layout.block_positions(num_blocks, first_layer, block_size).tolist()
    return positions
