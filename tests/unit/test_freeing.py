"""The order in which blocks are given back, against a naive model of which tokens each block holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_plan import LAYERS, Case, cases
from vllm_flow.engine.core.freeing import by_position

Block = tuple[int, int]
"""Storage group and index in its block table."""


def needed(case: Case, prefix: int, group: int, group_layers: int, block_size: int) -> set[int]:
    """Blocks of a group that some layer of it stores one of the first tokens in."""
    layers = range(group * group_layers, (group + 1) * group_layers)
    return {
        case.rank(position, layer) // block_size
        for layer in layers
        for position in range(prefix)
        if case.alive(position, layer)
    }


@settings(deadline=None)
@given(cases(), st.sampled_from([1, 2, 3, 6]), st.integers(1, 5))
def test_what_a_prefix_needs_comes_first(case: Case, group_layers: int, block_size: int) -> None:
    """Evicted from the back, the longest prefix that is left is as long as it can be."""
    starts = range(0, LAYERS, group_layers)
    groups: list[list[Block]] = []
    for group in range(len(starts)):
        count = len(needed(case, case.length, group, group_layers, block_size))
        groups.append([(group, index) for index in range(count)])
    order = by_position(groups, case.layout, list(starts), block_size)
    assert sorted(order) == sorted(block for blocks in groups for block in blocks)
    for prefix in range(case.length + 1):
        wanted = {
            (group, index)
            for group in range(len(starts))
            for index in needed(case, prefix, group, group_layers, block_size)
        }
        assert set(order[: len(wanted)]) == wanted


def test_groups_of_a_request_that_evicts_nothing_take_turns() -> None:
    groups = [[(group, index) for index in range(3)] for group in range(2)]
    order = by_position(groups, None, [0, 3], 16)
    assert order == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_a_group_that_holds_more_gives_it_back_first() -> None:
    groups = [[(0, index) for index in range(3)], [(1, index) for index in range(1)]]
    order = by_position(groups, None, [0, 3], 16)
    assert order == [(0, 0), (1, 0), (0, 1), (0, 2)]
