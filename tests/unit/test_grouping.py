"""How many layers share a block table: what vLLM keeps as it is, and what is left empty."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.grouping import (
    FEW_GROUPS,
    GROUPS_BESIDE_STATES,
    GROUPS_WITH_A_DRAFTER,
    MAX_GROUPS,
    MAX_PADDING,
    DecoderLayers,
)

LAYERS = st.integers(1, 130)


def sizes_of(num_layers: int, group_layers: int) -> list[int]:
    return [last + 1 - first for first, last in DecoderLayers(num_layers).groups(group_layers)]


def beside_states(num_layers: int, attending: Sequence[int], drafts: int = 0) -> DecoderLayers:
    return DecoderLayers(num_layers, tuple(attending), drafts)


@pytest.mark.parametrize("group_layers", [0, -1, 4, 5, 7])
def test_groups_that_vllm_would_split_are_refused(group_layers: int) -> None:
    says = "6 decoder layers a group of no more than two thirds of it, or none at all; use one of 1, 2, 3, 6"
    with pytest.raises(ValueError, match=says):
        DecoderLayers(6).groups(group_layers)


@given(LAYERS)
def test_every_size_that_is_left_is_one_that_vllm_keeps(num_layers: int) -> None:
    """vLLM pads to the largest group where that is less than 1.5 times the smallest, and else splits."""
    usable = DecoderLayers(num_layers).group_sizes()
    for size in range(1, num_layers + 1):
        if size not in usable:
            rest = num_layers % size
            assert rest and size >= 1.5 * rest
            continue
        sizes = sizes_of(num_layers, size)
        assert sum(sizes) == num_layers and set(sizes[:-1]) <= {size}
        assert max(sizes) == min(sizes) or max(sizes) < 1.5 * min(sizes)


@given(LAYERS)
def test_the_default_is_fine_where_it_can_be_and_wastes_little(num_layers: int) -> None:
    decoder = DecoderLayers(num_layers)
    size = decoder.default_group_layers()
    sizes = sizes_of(num_layers, size)
    assert len(sizes) <= MAX_GROUPS
    padding = len(sizes) * size - num_layers
    assert padding <= MAX_PADDING * num_layers
    if padding:  # then equal groups would have been few
        equal = [s for s in decoder.group_sizes() if num_layers % s == 0]
        assert not any(FEW_GROUPS <= num_layers // s <= MAX_GROUPS for s in equal)


@pytest.mark.parametrize(
    ("num_layers", "group_layers", "last"),
    [
        *[(32, 4, 4), (30, 5, 5), (28, 4, 4), (80, 10, 10), (4, 1, 1), (22, 11, 11)],
        # No good divisor: two groups, or one, if they had to be equal.
        *[(26, 9, 8), (31, 4, 3), (34, 5, 4), (46, 8, 6), (62, 8, 6), (94, 12, 10)],
    ],
)
def test_default_granularity(num_layers: int, group_layers: int, last: int) -> None:
    assert DecoderLayers(num_layers).default_group_layers() == group_layers
    assert sizes_of(num_layers, group_layers)[-1] == last


@pytest.mark.parametrize(
    ("num_layers", "draft_layers", "size"),
    [
        (44, 0, 11),  # four equal groups are few enough to waste nothing, three are not
        (39, 0, 5),
        (23, 1, 2),  # with a drafter up to twelve groups
        (25, 1, 9),
        (30, 3, 3),  # its layers just fit
    ],
)
def test_what_decides_the_default(num_layers: int, draft_layers: int, size: int) -> None:
    assert DecoderLayers(num_layers, (), draft_layers).default_group_layers() == size


def test_a_group_that_has_no_room_for_a_drafter_is_refused() -> None:
    decoder = DecoderLayers(9, draft_layers=3)
    assert decoder.group_starts(3) == (-3, 0, 3, 6)
    for size in (1, 2):
        with pytest.raises(ValueError, match="3 of its drafter .* no room; use one of 3, 4, 6"):
            decoder.groups(size)


def test_groups_without_drafter_or_states() -> None:
    assert DecoderLayers(6).groups(2) == ((0, 1), (2, 3), (4, 5))
    assert [DecoderLayers(n).default_group_layers() for n in (6, 28)] == [1, 4]
    beside = beside_states(8, (3, 7))
    assert beside.group_sizes() == tuple(range(1, 9))
    assert beside.groups(4) == ((3, 3), (7, 7))


def test_a_drafters_layers_are_counted_as_far_apart_as_the_models_first_one_is() -> None:
    """Two at 2 and 5, and then four from 8 on: five layers would hold one of them, and then three."""
    assert beside_states(8, (2, 3, 4, 5), 2).group_sizes() == (9, 12, 13, 14)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 3), st.data())
def test_where_every_few_layers_one_attends_groups_are_of_whole_periods(
    period: int, count: int, drafts: int, data: st.DataObject
) -> None:
    """A drafter's layer counts as a period: groups of so many periods hold as many layers, whoever's they are."""
    num_layers, attending = period * count, range(period - 1, period * count, period)
    decoder = beside_states(num_layers, attending, drafts)
    sizes = decoder.group_sizes()
    assert sizes[-1] == period * (count + drafts), "all in one group"
    each = data.draw(st.integers(1, count + drafts))

    def equal(stored: list[int]) -> list[tuple[int, int]]:
        starts = range(0, len(stored), each)
        return [(stored[at], stored[at + each - 1]) for at in starts]

    expected = None
    if (count + drafts) % each == 0 and each >= drafts:
        expected = equal([*range(-drafts, 0), *attending])
    elif drafts == 1 and count % each == 0 and count > each:  # vLLM divides the first
        (_, last), *others = equal([*attending])
        expected = [(-1, last), (-1, last), *others]
    assert (each * period in sizes) == (expected is not None)
    if expected is not None:
        assert decoder.groups(each * period) == tuple(expected)


ATTENDING = st.sets(st.integers(0, 63), min_size=1).map(sorted)


@given(ATTENDING, st.integers(1, 64))
def test_groups_beside_states_have_as_many_layers_each(attending: list[int], size: int) -> None:
    decoder = beside_states(64, attending)
    if size not in decoder.group_sizes():
        says = f"group_layers={size} parts the {len(attending)} of .* 64 decoder layers that have keys into"
        with pytest.raises(ValueError, match=says):
            decoder.groups(size)
        return
    groups = decoder.groups(size)
    members = [[layer for layer in attending if first <= layer <= last] for first, last in groups]
    assert sum(members, []) == attending
    assert len({len(layers) for layers in members}) == 1
    assert all(last - first < size for first, last in groups)


@given(ATTENDING, st.integers(1, 80), st.integers(1, 3))
def test_a_drafters_layers_come_first_beside_states(
    attending: list[int], size: int, drafts: int
) -> None:
    decoder = beside_states(64, attending, drafts)
    if size not in decoder.group_sizes():
        with pytest.raises(ValueError, match=f"group_layers={size} .* {drafts} of its drafter"):
            decoder.groups(size)
        return
    groups = decoder.groups(size)
    stored = [*range(-drafts, 0), *attending]
    members = [[layer for layer in stored if first <= layer <= last] for first, last in groups]
    assert members[0][:drafts] == [*range(-drafts, 0)]
    if len(set(groups)) < len(
        groups
    ):  # vLLM divides the first, whose layers are one more than the others'
        assert drafts == 1 and groups[0] == groups[1] and len(set(groups[1:])) == len(groups) - 1
        each = len(members[2])
        assert len(members.pop(0)) == each + 1 and -(-(each + 1) // each) == 2
        members[0] = members[0][1:]
        stored = [*attending]
    assert sum(members, []) == stored
    assert len({len(layers) for layers in members}) == 1


@given(ATTENDING, st.integers(0, 3))
def test_the_default_beside_states_has_few_groups_with_a_drafter_too(
    attending: list[int], drafts: int
) -> None:
    decoder = beside_states(64, attending, drafts)
    few = GROUPS_BESIDE_STATES + (drafts == 1)
    assert 1 <= len(decoder.groups(decoder.default_group_layers())) <= few


@pytest.mark.parametrize(
    ("num_layers", "size", "groups"),
    [
        *[(32, 12, 3), (60, 16, 4), (24, 8, 4), (40, 8, 6), (48, 12, 5), (64, 16, 5), (4, 4, 2)],
        (100, 20, 6),  # 26 would be two groups, 25 are five
        (52, 28, 2),  # 13 would be one, which vLLM does not divide
    ],
)
def test_default_granularity_where_a_drafters_layer_attends_too(
    num_layers: int, size: int, groups: int
) -> None:
    """Where their number is a prime, those of the model alone, of which the first is divided."""
    decoder = beside_states(num_layers, range(3, num_layers, 4), 1)
    assert decoder.default_group_layers() == size
    assert len(decoder.groups(size)) == groups


@given(ATTENDING)
def test_the_default_beside_states_has_few_groups(attending: list[int]) -> None:
    decoder = beside_states(64, attending)
    groups = decoder.groups(decoder.default_group_layers())
    assert 1 <= len(groups) <= GROUPS_BESIDE_STATES


@pytest.mark.parametrize(
    ("num_layers", "size", "groups"), [(24, 8, 3), (32, 8, 4), (40, 8, 5), (48, 12, 4), (64, 16, 4)]
)
def test_default_granularity_where_every_fourth_layer_attends(
    num_layers: int, size: int, groups: int
) -> None:
    decoder = beside_states(num_layers, range(3, num_layers, 4))
    assert decoder.default_group_layers() == size
    assert len(decoder.groups(size)) == groups


@given(LAYERS, st.integers(0, 3), st.data())
def test_groups_of_either_kind_hold_every_layer_that_has_keys_once(
    num_layers: int, draft_layers: int, data: st.DataObject
) -> None:
    """In their order, from a drafter's first one on; by default there are few, in either kind."""
    attending: tuple[int, ...] = ()
    if not draft_layers and data.draw(st.booleans()):
        step = data.draw(st.integers(1, num_layers))
        attending = tuple(range(step - 1, num_layers, step))
    stored = attending or tuple(range(-draft_layers, num_layers))
    decoder = DecoderLayers(num_layers, attending, draft_layers)
    groups = decoder.groups(decoder.default_group_layers())
    held = [layer for first, last in groups for layer in stored if first <= layer <= last]
    assert held == list(stored)
    assert all(first in stored and last in stored for first, last in groups)
    most = (
        GROUPS_BESIDE_STATES if attending else GROUPS_WITH_A_DRAFTER if draft_layers else MAX_GROUPS
    )
    assert len(groups) <= most
