"""What a layout says of layers, prefixes and chunks, where it is easily got wrong by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.staged_cases import LAYERS, Case, cases
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.ranks import RANKS
from vllm_flow.spans import ImageSpans

PROMPT = 40
LATE = tuple(name for name, rank in RANKS.items() if rank.late)


def layout_of(policy: FlowPolicy, *images: tuple[int, int]) -> TokenLayout:
    found = TokenLayout.of(policy, [ImageSpans((image,)) for image in images], PROMPT)
    assert found is not None
    return found


@given(cases(), st.data())
def test_layers_are_in_the_stage_that_began_last(case: Case, data: st.DataObject) -> None:
    layout = case.layout
    if layout is None:
        return
    for layer in range(LAYERS):
        begun = [stage for stage in layout.stages if stage.layer <= layer]
        assert layout.stage_at(layer) == len(begun)
        assert layout.evicts_at(layer) == bool(begun)
        assert layout.evicted(layer) == (begun[-1].evicted if begun else None)
    first = data.draw(st.integers(0, LAYERS - 1))
    last = data.draw(st.integers(first, LAYERS - 1))
    each = [layout.evicted(layer) for layer in range(first, last + 1)]
    found = layout.stages_in(first, last)
    assert [stage.layer for stage in found] == sorted({stage.layer for stage in found})
    assert [stage.evicted for stage in layout.stages if stage in found] == [
        stage.evicted for stage in found
    ]
    for layer in range(first, last + 1):
        stage = layout.stage_at(layer)
        assert (stage == 0) == (each[layer - first] is None)
        assert stage == 0 or layout.stages[stage - 1] in found
    assert len(found) == len({layout.stage_at(layer) for layer in range(first, last + 1)} - {0})


def test_a_policy_for_other_images_is_none_for_these() -> None:
    two = FlowPolicy(((Stage(1),), (Stage(2),)))
    one = ImageSpans(((4, 12),))
    with pytest.raises(ValueError, match="for 2 images, but there is 1"):
        TokenLayout.of(two, [one], PROMPT)
    assert TokenLayout.of(two, [], PROMPT) is None
    assert TokenLayout.of(two, [ImageSpans(), ImageSpans()], PROMPT) is None


def test_a_rank_by_the_whole_prompt_needs_its_length_even_of_a_picture_at_its_start() -> None:
    policy = FlowPolicy(((Stage(2, 3, "last_prompt"),),))
    with pytest.raises(ValueError, match="how long"):
        TokenLayout.of(policy, ImageSpans(((0, 8),)))


def test_what_an_image_needs_at_its_first_choice_it_needs_at_all() -> None:
    policy = FlowPolicy(((Stage(1, 6, "last_prompt"), Stage(3, 2, "last_image")),))
    layout = layout_of(policy, (4, 12))
    assert layout.atomic == ((4, PROMPT),)
    assert [n for n in range(PROMPT) if not layout.may_end_at(n)] == [5, 6, 7, 8, 9]


def test_images_are_held_together_in_the_order_of_the_prompt() -> None:
    """Whichever is chosen of first."""
    policy = FlowPolicy(((Stage(3, 2, "last_prompt"),), (Stage(1, 2, "last_prompt"),)))
    layout = layout_of(policy, (4, 12), (14, 22))
    assert layout.atomic == ((4, PROMPT), (14, PROMPT))
    assert layout.shortened_chunk(0, 20) == 4


def test_a_drafter_reads_no_token_of_what_waits_to_be_computed_together() -> None:
    """It would have an image encoded, and kept, before the others."""
    policy = FlowPolicy(((Stage(3, 2, "last_prompt"),),))
    layout = layout_of(policy, (4, 12), (14, 22))
    assert [layout.shortened_chunk(0, n, 1) for n in (3, 4, 5, 20, PROMPT)] == [3, 4, 3, 3, PROMPT]
    assert layout.shortened_chunk(4, 8, 1) == 0
    # Right behind another image, which would not be computed without its last token.
    close = layout_of(FlowPolicy(((Stage(1, 2, "last_image"),),)), (4, 12), (12, 20))
    assert [close.shortened_chunk(0, n, 1) for n in (11, 12, 13, 20)] == [3, 12, 12, 20]


@given(cases(), st.data())
def test_what_a_chunk_leaves_out_it_was_to_compute(case: Case, data: st.DataObject) -> None:
    layout = case.layout
    if layout is None:
        return
    computed = data.draw(st.integers(0, case.length - 1))
    wanted = data.draw(st.integers(0, case.length - computed))
    scheduled = data.draw(st.integers(0, wanted))
    left = [
        (start, stop)
        for start, stop in layout.atomic
        if not {*range(start, stop)} & {*range(computed, computed + scheduled)}
        and {*range(start, stop)} <= {*range(computed + scheduled, computed + wanted)}
    ]
    assert layout.leaves_out(computed, scheduled, wanted) == bool(left)


@pytest.mark.parametrize("layers", [(1, 1), (1, 3), (3, 1)], ids=str)
def test_a_prefix_that_ends_in_no_image_may_end_in_the_one_before(layers: tuple[int, int]) -> None:
    """Whichever is chosen of first."""
    policy = FlowPolicy(tuple((Stage(layer, 8, "last_image"),) for layer in layers))
    layout = layout_of(policy, (2, 13), (14, 26))
    # Blocks of four: 20 is within the second image, 12 is not past what stays of the first (2 to 10).
    assert layout.last_end(20, 4) == 12
    # Of eight: 16 is within the second, and 8 within the first.
    assert layout.last_end(20, 8) == 0


def test_what_no_rank_looks_past_is_found_by_its_own_hash() -> None:
    layout = replace(layout_of(FlowPolicy.withdrawal(2), (4, 12)), digest=b"prompt")
    assert layout.shareable is None
    assert layout.key(b"prefix", PROMPT) == b"prefix"


@given(cases(), st.integers(1, 5))
def test_slots_and_blocks_are_those_of_the_tokens_that_are_left(
    case: Case, block_size: int
) -> None:
    layout = case.layout
    if layout is None:
        return
    for layer in range(LAYERS):
        evicted = layout.evicted(layer)
        left = [p for p in range(case.length) if evicted is None or not evicted.is_image(p)]
        everywhere = np.arange(case.length)
        slots = layout.stored_positions(everywhere, layer).tolist()
        assert slots == [sum(q < p for q in left) for p in everywhere]
        blocks = -(-len(left) // block_size)
        assert layout.block_positions(blocks, layer, block_size).tolist() == left[::block_size]


def test_what_leaves_late_is_there_while_the_prompt_is_computed() -> None:
    stages = (Stage(2, 4, "last_image"), Stage(4, 2, "uniform"))
    late = layout_of(FlowPolicy((stages,), when="decode"), (4, 12))
    assert late.read_layers == (1,), "what the host chooses reads no attention"
    assert late.atomic == () and late.may_end_at(6) and late.shareable is None
    assert late.evicted_tokens() == late.evicted_tokens(PROMPT + 1) == ((2, 4), (4, 6))
    assert late.evicted_tokens(PROMPT) == ((2, 0), (4, 0))
    assert [late.stored_tokens(n, 4) for n in (12, PROMPT, PROMPT + 1)] == [12, PROMPT, PROMPT - 5]
    assert layout_of(FlowPolicy((stages,)), (4, 12)).read_layers == ()
    to_the_end = layout_of(FlowPolicy((stages,), when="decode"), (4, PROMPT))
    assert to_the_end.totals == (PROMPT - 8, PROMPT - 6)
    with pytest.raises(ValueError, match="how long it is"):
        TokenLayout.of(FlowPolicy((stages,), when="decode"), ImageSpans(((4, 12),)), 11)


def test_what_is_generated_without_the_image_is_nobody_elses() -> None:
    late = layout_of(FlowPolicy(((Stage(2),),), when="decode"), (4, 12))
    assert [late.findable(n) for n in (6, PROMPT, PROMPT + 8)] == [6, PROMPT, PROMPT]
    assert [late.last_end(n, 4) for n in (7, PROMPT, PROMPT + 8)] == [4, PROMPT, PROMPT]


def test_what_leaves_in_the_prefill_is_gone_while_the_prompt_is_computed() -> None:
    layout = layout_of(FlowPolicy.withdrawal(2), (4, 12))
    assert layout.gone_by(1) and layout.gone_by(PROMPT + 1)
    assert [layout.stored_tokens(n, 2) for n in (4, 6, 12, PROMPT)] == [4, 4, 4, PROMPT - 8]
    assert layout.evicted_tokens(5) == layout.evicted_tokens() == ((2, 8),)


@given(cases(), st.data())
def test_a_chunk_that_begins_with_what_goes_together_holds_all_of_it(
    case: Case, data: st.DataObject
) -> None:
    """And no more than it must, nor than there is room for; nothing stays nothing."""
    layout = case.layout
    if layout is None:
        return
    begins = [start for start, _ in layout.atomic]
    computed = data.draw(st.sampled_from(begins) if begins else st.integers(0, case.length))
    scheduled, at_most = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 20))
    whole = [stop for start, stop in layout.atomic if start == computed]
    ends = (
        end
        for end in range(computed + scheduled, computed + scheduled + case.prompt + 1)
        if not scheduled or not any(computed < end < stop for stop in whole)
    )
    found = layout.extended_chunk(computed, scheduled, at_most)
    assert found == min(next(ends) - computed, at_most)


@given(cases() | cases(LATE), st.booleans(), st.data())
def test_a_chunk_is_as_long_as_it_may_be(case: Case, late: bool, data: st.DataObject) -> None:
    """It divides nothing that it has the beginning of, nor joins a late prompt with what follows; of a prompt on
    whose attention others are chosen by, its end is more than a token."""
    if late and case.policy.ranks <= {*LATE}:
        case = replace(case, policy=replace(case.policy, when="decode"))
    layout = case.layout
    if layout is None:
        return
    computed = data.draw(st.integers(0, case.length - 1))
    scheduled = data.draw(st.integers(1, case.length - computed))

    def may_end(end: int) -> bool:
        if not layout.late:
            return not any(computed <= start < end < stop for start, stop in layout.atomic)
        if computed >= case.prompt:
            return True
        return end <= case.prompt and not (layout.read_layers and end == case.prompt - 1)

    ends = [end for end in range(computed + 1, computed + scheduled + 1) if may_end(end)]
    found = layout.shortened_chunk(computed, scheduled)
    assert found == max(ends, default=computed) - computed
