"""Images that leave after the prefill: blocks and slots, against a cache that holds the tokens' names."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.staged_cases import LAYERS, Case, apply, cases
from vllm_flow.block_counts import predict_blocks
from vllm_flow.grouping import DecoderLayers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy
from vllm_flow.ranks import RANKS, PositionRank
from vllm_flow.rewriting import (
    LateReading,
    Need,
    Rewrite,
    choosing_plan,
    is_rewritten,
    late_readings,
    moved_positions,
    need,
    overlap,
)
from vllm_flow.spans import ImageSpans
from vllm_flow.step import scheduled_request

LATE = tuple(name for name, rank in RANKS.items() if rank.late)


def late_cases() -> st.SearchStrategy[Case]:
    def late(case: Case) -> Case:
        return replace(case, policy=replace(case.policy, when="decode"))

    return cases(LATE).map(late).filter(lambda case: case.layout is not None)


def positions_left(case: Case, layout: TokenLayout, layer: int) -> np.ndarray | None:
    """What a device would choose, once the prompt is computed; None where the host knows."""
    plan = choosing_plan(layout)
    if plan is None or layer < layout.breaks[0]:
        return None
    return np.array(apply(plan, layer, [(case, 0)], [0]))


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, int]:
    """First layer of a storage group, and how many layers it has."""
    layers = draw(st.sampled_from([n for n in range(1, LAYERS + 1) if LAYERS % n == 0]))
    return draw(st.sampled_from(DecoderLayers(LAYERS).group_starts(layers))), layers


@given(late_cases(), divisions(), st.integers(1, 7), st.data())
def test_what_stays_is_where_the_layers_look_for_it(
    case: Case, division: tuple[int, int], block_size: int, data: st.DataObject
) -> None:
    layout, (first, layers) = case.layout, division
    last = first + layers - 1
    if layout is None or not is_rewritten(layout, last):
        assert case.alive(last) == list(range(case.length))
        return
    held = list(range(-(-case.prompt // block_size)))
    uses = [data.draw(st.integers(1, 2)) for _ in held]
    found = need(layout, first, last, case.prompt + 1, block_size, uses)
    old = held[found.kept :]
    # A full pool gives back the very blocks that it was just given.
    pool = [b for b in old if uses[b] == 1] + list(range(100, 100 + found.net))
    new = data.draw(st.permutations(pool))[: found.new]
    assert len(new) == found.new
    rewrite = Rewrite(found.kept, tuple(old), tuple(new))
    assert overlap([rewrite]) == bool(set(old) & set(new))
    table = held[: found.kept] + list(new)
    expected = predict_blocks(case.prompt + 1, layout, [first], block_size)
    assert (len(table),) == expected
    for layer in range(first, last + 1):
        cache = {slot: slot for slot in range(case.prompt)}  # by position, a token's name
        sources, packed = moved_positions(layout, layer, rewrite, block_size)
        chosen = positions_left(case, layout, layer)
        if chosen is not None:
            sources = chosen[rewrite.kept * block_size :]
        taken = [cache[slot] for slot in sources.tolist()]
        targets = [table[n // block_size] * block_size + n % block_size for n in packed]
        cache |= dict(zip(targets, taken, strict=True))
        left = [p for p in case.alive(layer) if p < case.prompt]
        slots = [table[n // block_size] * block_size + n % block_size for n in range(len(left))]
        assert [cache[slot] for slot in slots] == left
        # Nothing that others hold is written.
        shared = {b for b in held if uses[b] > 1}
        assert not shared & {slot // block_size for slot in targets}


@given(late_cases(), st.integers(1, 7))
def test_it_takes_no_more_than_a_block_for_the_next_token(case: Case, block_size: int) -> None:
    """A request that is alone in a pool that holds its prompt and that token is never stuck."""
    layout = case.layout
    assert layout is not None
    held = -(-case.prompt // block_size)
    for layer in range(LAYERS):
        if is_rewritten(layout, layer):
            found = need(layout, layer, layer, case.prompt + 1, block_size, [1] * held)
            assert isinstance(found, Need) and found.net == 0


@given(late_cases(), st.integers(1, 7))
def test_blocks_before_the_first_token_that_may_leave_stay(case: Case, block_size: int) -> None:
    """A device may choose any token of an image, the first one, too."""
    layout = case.layout
    assert layout is not None
    held = -(-case.prompt // block_size)
    for layer in range(LAYERS):
        moved = []
        for index, image in enumerate(case.images):
            left = len(image)
            for stage in case.policy.stages_of(index):
                keep = min(stage.kept(len(image)), left)
                by_place = keep == 0 or isinstance(RANKS[stage.rank or ""], PositionRank)
                if stage.layer <= layer and keep < left and not by_place:
                    moved.append(image[0])
                left = keep if stage.layer <= layer else left
            moved += sorted(set(image) - case.left(layer))[:1]
        if is_rewritten(layout, layer):
            found = need(layout, layer, layer, case.prompt + 1, block_size, [1] * held)
            assert found.kept == min(moved) // block_size
        else:
            assert not moved


@given(late_cases(), st.integers(2, 9))
def test_a_prompt_is_computed_like_any_and_what_follows_apart(case: Case, budget: int) -> None:
    """Whatever the chunks, no step has tokens of the prompt and behind it; the prompt's need no plan."""
    layout, computed = case.layout, 0
    assert layout is not None and not layout.atomic and layout.shareable is None
    for _ in count():
        if computed == case.length:
            break
        scheduled = layout.shortened_chunk(computed, min(budget, case.length - computed))
        assert scheduled > 0
        alone = (computed, scheduled) == (case.prompt - 1, 1)
        assert not (alone and layout.read_layers and computed), "a captured step reads nothing"
        request = scheduled_request(computed, scheduled, layout)
        plan = plan_step([request])
        computed += scheduled
        assert (plan is None) == (computed <= case.prompt)
        if plan is None:
            continue
        for layer in range(LAYERS):
            variant = plan.variant_at(layer)
            if variant is None:
                continue
            assert variant.rows is None and variant.gather is None and not variant.rankings
            seen = [p for p in case.alive(layer) if p < computed]
            assert variant.seq_lens.tolist() == [len(seen)]
            assert variant.positions.tolist() == list(range(len(seen) - scheduled, len(seen)))
    with pytest.raises(ValueError, match="in one step"):
        scheduled_request(case.prompt - 1, 2, layout)


@given(late_cases())
def test_until_then_it_holds_what_a_prompt_without_a_policy_does(case: Case) -> None:
    layout = case.layout
    assert layout is not None
    for tokens in range(case.length + 3):
        whole = tokens <= case.prompt
        for layer in range(LAYERS):
            gone = 0 if whole else len(set(range(case.length)) - set(case.alive(layer)))
            assert layout.stored_tokens(tokens, layer) == tokens - gone
        assert any(gone for _, gone in layout.evicted_tokens(tokens)) == (not whole)


@given(late_cases(), cases(), st.integers(0, 3), st.booleans())
def test_the_last_row_of_a_prompt_is_read_whatever_leaves_beside_it(
    case: Case, other: Case, tail: int, first: bool
) -> None:
    layout, beside = case.layout, other.layout
    assert layout is not None
    computed = max(case.prompt - 1 - tail, 0)
    shares = [(computed, case.prompt - computed, layout), (0, other.prompt, beside)]
    shares = shares if first else shares[::-1]
    plan = plan_step([scheduled_request(*share) for share in shares])
    index = 0 if first else 1
    last = sum(scheduled for _, scheduled, _ in shares[: index + 1]) - 1
    found = list(late_readings(plan, shares))
    assert [reading.layer for reading in found] == list(layout.read_layers)
    starts = [0, shares[0][1]]
    batch = [(case, computed), (other, 0)] if first else [(other, 0), (case, computed)]
    for reading in found:
        assert isinstance(reading, LateReading)
        assert (reading.request, reading.visible) == (index, case.prompt)
        rows = list(range(last + other.prompt + 9))
        if plan is not None:
            rows = apply(plan, reading.layer, batch, starts)
        assert rows[reading.row] == last
    assert not list(late_readings(plan, [(0, case.prompt - 1, layout)]))


@given(late_cases())
def test_a_step_without_a_plan_reads_its_own_last_row(case: Case) -> None:
    """Nothing has left of it; before it in the batch a request that never evicts."""
    found = list(late_readings(None, [(0, 4, None), (0, case.prompt, case.layout)]))
    assert case.layout is not None
    assert found == [
        LateReading(1, layer, 4 + case.prompt - 1, case.prompt) for layer in case.layout.read_layers
    ]


@given(cases())
def test_what_leaves_in_the_prefill_is_never_rewritten(case: Case) -> None:
    layout = case.layout
    assert layout is None or not any(is_rewritten(layout, layer) for layer in range(LAYERS))


@given(late_cases())
def test_a_plan_to_choose_by_is_there_where_a_device_chooses(case: Case) -> None:
    layout = case.layout
    assert layout is not None
    plan, chosen = choosing_plan(layout), [c for stage in layout.stages for c in stage.choices]
    assert (plan is None) == (not chosen)
    if plan is not None:
        made = [ranking.choice for variant in plan.variants for ranking in variant.rankings]
        assert made == chosen and plan.num_rows == case.prompt


def test_a_late_layout_needs_its_prompt() -> None:
    policy = replace(FlowPolicy.withdrawal(2), when="decode")
    with pytest.raises(ValueError, match="how long it is"):
        TokenLayout.of(policy, ImageSpans(((3, 9),)))
