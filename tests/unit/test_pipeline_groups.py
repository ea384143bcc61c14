"""Storage groups over a pipeline's stages: a share of each in every group, and blocks that cost as little as may be."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_flow.grouping import FEW_GROUPS, MAX_GROUPS, DecoderLayers
from vllm_flow.pipeline_groups import PipelineStages

STAGES = st.lists(st.integers(1, 40), min_size=2, max_size=5).map(tuple)


@st.composite
def divided(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """Stages, and a number of groups."""
    stages = draw(STAGES)
    return stages, draw(st.integers(1, min(stages)))


@given(divided())
def test_each_group_has_consecutive_layers_of_every_stage(
    case: tuple[tuple[int, ...], int],
) -> None:
    stages, groups = case
    slices = PipelineStages(stages).slices(groups)
    assert len(slices) == groups
    first = 0
    for stage, layers in enumerate(stages):
        own = [group[stage] for group in slices]
        assert [layer for part in own for layer in part] == list(range(first, first + layers))
        assert min(map(len, own)) >= 1 and max(map(len, own)) == -(-layers // groups)
        assert max(map(len, own)) - min(map(len, own)) <= 1
        first += layers
    sizes = [sum(map(len, group)) for group in slices]
    assert max(sizes) - min(sizes) <= 1


@given(STAGES)
@example((3, 2))
def test_what_is_usable_vllm_keeps_and_a_block_has_room_for(stages: tuple[int, ...]) -> None:
    """vLLM pads to the largest group where that is less than 1.5 times the smallest, and else splits."""
    decoder = DecoderLayers(sum(stages), pipeline=stages)
    usable = decoder.group_sizes()
    assert sum(stages) in usable  # one group of all
    for size in usable:
        groups = decoder.groups(size)
        slices = PipelineStages(stages).slices(len(groups))
        sizes = [sum(map(len, own)) for own in slices]
        assert max(sizes) == min(sizes) or max(sizes) < 1.5 * min(sizes)
        largest = [max(len(own[stage]) for own in slices) for stage in range(len(stages))]
        assert sum(largest) == size
        for (first, last), own in zip(groups, slices, strict=True):
            assert (first, last) == (own[0][0], own[-1][-1])
            assert {decoder.group_of(size, layer) for part in own for layer in part} == {
                (first, last)
            }
        # Found by their first layers, which all lie on the first stage.
        starts = decoder.group_starts(size)
        assert list(starts) == sorted(set(starts)) and starts[-1] < stages[0]


@given(STAGES)
def test_the_default_wastes_least_of_what_is_fine_enough(stages: tuple[int, ...]) -> None:
    decoder, pipeline = DecoderLayers(sum(stages), pipeline=stages), PipelineStages(stages)
    count = len(decoder.groups(decoder.default_group_layers()))
    assert count <= MAX_GROUPS
    others = {len(decoder.groups(size)) for size in decoder.group_sizes()}
    fine = {n for n in others if FEW_GROUPS <= n <= MAX_GROUPS}
    assert not fine or count in fine
    assert all(pipeline.padding(count) <= pipeline.padding(n) for n in fine)


@pytest.mark.parametrize(
    ("stages", "group_layers", "groups"),
    [
        *[((16, 16), 4, 8), ((14, 14), 4, 7), ((20, 20, 20, 20), 16, 5)],
        # The stage of 12 has three pages in a block for 15 layers; that of 20 needs more.
        ((12, 20), 7, 5),
        # As vLLM divides 32 layers among three: nothing divides 11 and 10.
        *[((11, 11, 10), 6, 6), ((2, 30), 16, 2), ((1, 5), 6, 1)],
    ],
)
def test_default_granularity(stages: tuple[int, ...], group_layers: int, groups: int) -> None:
    decoder = DecoderLayers(sum(stages), pipeline=stages)
    assert decoder.default_group_layers() == group_layers
    assert len(decoder.groups(group_layers)) == groups


@given(divided())
def test_equal_slices_cost_what_stock_vllm_costs(case: tuple[tuple[int, ...], int]) -> None:
    """A token's blocks in all groups take the pages of all its layers, on every stage."""
    stages, groups = case
    layers = tuple(groups * n for n in stages)
    pipeline = PipelineStages(layers)
    assert pipeline.padding(groups) == 0
    assert pipeline.group_layers(groups) * groups == sum(layers)
    for own in pipeline.slices(groups):
        assert tuple(map(len, own)) == stages


@pytest.mark.parametrize("group_layers", [0, 1, 3, 5, 7, 13])
def test_groups_that_some_stage_has_no_part_in_are_refused(group_layers: int) -> None:
    says = "stages of 3, 3 decoder layers .* use one of 2, 4, 6, or stages of other lengths"
    with pytest.raises(ValueError, match=says):
        DecoderLayers(6, pipeline=(3, 3)).groups(group_layers)
