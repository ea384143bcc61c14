"""Layouts and plans of policies that keep tokens, against a naive model that chooses one token at a time.

The naive model gives every image token a score of its own and makes every choice on it, whichever rank asks: what a
device would do, in Python. Ranks by place choose by their own rule among the tokens left.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.staged_cases import (
    LAYERS,
    Case,
    cases,
    check_step,
    choosing,
    chunks,
)
from vllm_flow.block_counts import evicted_at, predict_blocks, stored_blocks
from vllm_flow.boundaries import packed_boundary
from vllm_flow.decode_plan import EVERYTHING, decode_facts
from vllm_flow.grouping import DecoderLayers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.ranks import RANKS, PositionRank
from vllm_flow.spans import ImageSpans
from vllm_flow.step import ScheduledRequest


@settings(max_examples=60, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=3), st.booleans(), st.data())
def test_every_layer_of_every_step_matches_the_naive_model(
    batch: list[Case], spares: bool, data: st.DataObject
) -> None:
    ends = [data.draw(chunks(case)) for case in batch]
    for step in range(max(map(len, ends)) - 1):
        now = [
            (case, own[step], own[step + 1])
            for case, own in zip(batch, ends, strict=True)
            if step + 1 < len(own)
        ]
        check_step(now, [own[0] for own in ends if step + 1 < len(own)], spares)


@settings(max_examples=80, deadline=None)
@given(st.lists(choosing(), min_size=1, max_size=2), st.data())
def test_of_every_choice_the_device_is_told_who_asks_and_what_he_sees(
    batch: list[Case], data: st.DataObject
) -> None:
    """Of prompts that are computed in one step, but for a prefix of text and what follows."""
    prefixes = [data.draw(st.integers(0, min(map(min, case.images)))) for case in batch]
    ends = [data.draw(st.sampled_from([case.prompt, case.length])) for case in batch]
    check_step(list(zip(batch, prefixes, ends, strict=True)), prefixes, spares=False)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 5), st.sampled_from([1, 2, 3, 6]))
def test_blocks_and_boundaries_match_the_naive_model(
    case: Case, block_size: int, group_layers: int
) -> None:
    layout = case.layout
    if layout is None:
        assert all(len(case.alive(layer)) == case.length for layer in range(LAYERS))
        return
    starts = DecoderLayers(LAYERS).group_starts(group_layers)
    ends = [n for n in range(case.length + 1) if layout.may_end_at(n)]
    assert ends[0] == 0 and case.length in ends
    chosen_of = [range(c.start + 1, c.stop) for stage in layout.stages for c in stage.choices]
    for tokens in range(case.length + 1):
        if any(tokens in extent for extent in chosen_of):
            continue  # what is stored of it, the next test says
        expected = tuple(
            -(-sum(p < tokens for p in case.alive(start)) // block_size) for start in starts
        )
        assert predict_blocks(tokens, layout, starts, block_size) == expected
        if tokens >= case.prompt:
            gone = layout.evicted_tokens()
            assert stored_blocks(tokens, gone, starts, block_size) == expected
    for stage in layout.stages:
        full: list[int] = []
        for num_blocks in range(1, case.length // block_size + 1):
            boundary = packed_boundary(stage.evicted, num_blocks, block_size)
            if boundary.completed is not None:
                full = [*full[: boundary.completed], boundary.completed]
            assert full == list(range(boundary.full_blocks))
    for n in range(case.length + 1):
        assert layout.last_end(n, block_size) == max(
            e
            for e in range(0, n + 1, block_size)
            if layout.may_end_at(e) and e <= (n if layout.shareable is None else layout.shareable)
        )


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_a_prefix_that_may_end_has_all_that_stays(case: Case, data: st.DataObject) -> None:
    """Of an image in which it ends, that is more than the tokens before its end, which leave."""
    layout = case.layout
    if layout is None:
        return
    end = data.draw(st.sampled_from([n for n in range(case.prompt) if layout.may_end_at(n)]))
    for layer in range(LAYERS):
        made = [c for s in layout.stages if s.layer <= layer for c in s.choices]
        inside = {p for c in made if c.start < end < c.stop for p in range(c.start, c.stop)}
        stays = [p for p in case.alive(layer) if p < end or p in inside]
        evicted = layout.evicted(layer)
        assert len(stays) == end - (0 if evicted is None else evicted.count_before(end))
        # And nothing of that image is stored any more.
        assert all(evicted is not None and evicted.is_image(p) for p in inside if p >= end)


@settings(deadline=None)
@given(cases())
def test_the_device_is_asked_only_what_the_host_cannot_know(case: Case) -> None:
    """By its ranks; and once it has chosen, which rows are those of the text between an image's tokens."""
    expected = []
    for index, image in enumerate(case.images):
        left, text, chosen = len(image), image[-1] - image[0] + 1 - len(image), False
        for stage in case.policy.stages_of(index):
            keep = stage.kept(len(image))
            if keep >= left:
                continue
            left = keep
            by_place = keep == 0 or isinstance(RANKS[stage.rank], PositionRank)
            if by_place and not (chosen and text):
                continue
            chosen = True
            picked = keep if by_place else None
            expected.append((stage.layer, index, keep + text, picked))
    layout = case.layout
    found = [
        (stage.layer, c.image, c.keep, None if c.picks is None else len(c.picks))
        for stage in (layout.stages if layout is not None else ())
        for c in stage.choices
    ]
    assert found == sorted(expected, key=lambda each: each[:2])


@pytest.mark.parametrize(("ranges", "asked"), [([(4, 12)], [1]), ([(4, 7), (8, 13)], [1, 3])])
def test_places_among_rows_that_the_device_chose_are_known_where_no_text_is_between(
    ranges: list[tuple[int, int]], asked: list[int]
) -> None:
    policy = FlowPolicy(((Stage(1, 6, "last_image"), Stage(3, 2, "uniform")),))
    layout = TokenLayout.of(policy, [ImageSpans.from_ranges(ranges)], 15)
    assert layout is not None
    assert [stage.layer for stage in layout.stages if stage.choices] == asked
    picks = {choice.picks for stage in layout.stages[1:] for choice in stage.choices}
    assert picks <= {(1, 4)}, "the middles of two halves of the six that are left"


@pytest.mark.parametrize("empty", [0, 1])
def test_an_image_without_tokens_is_none_for_the_others(empty: int) -> None:
    policy = FlowPolicy(((Stage(2, 3, "last_image"), Stage(4)),))
    image = ImageSpans.from_ranges([(4, 7), (8, 12)])
    both = [image, image]
    both[empty] = ImageSpans()
    alone, found = (TokenLayout.of(policy, images, 15) for images in ([image], both))
    assert alone is not None and found is not None
    assert [stage.evicted for stage in found.stages] == [stage.evicted for stage in alone.stages]
    assert (found.atomic, found.spans) == (alone.atomic, alone.spans)
    for n in range(16):
        assert found.may_end_at(n) == alone.may_end_at(n)


@settings(max_examples=50, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_decode_facts_say_what_the_plan_says(
    batch: list[Case], count: int, data: st.DataObject
) -> None:
    """Of one token per request anywhere, of several behind the images, whatever the host believes of the length."""
    requests, told = [], []
    for case in batch:
        token, more = data.draw(st.integers(0, case.length + 3)), 0
        layout = case.layout
        if count > 1 and layout is not None:
            token = max(token, layout.spans.end)
            more = data.draw(st.integers(0, count - 1))
        if layout is not None and any(start <= token < stop for start, stop in layout.atomic):
            token = case.prompt  # a scheduler computes these together
        requests.append(ScheduledRequest(token, count, layout))
        told.append(ScheduledRequest(token + more, count, layout))
    plan, facts = plan_step(requests), decode_facts(told, LAYERS)
    stages = [len(case.layout.stages) for case in batch if case.layout is not None]
    assert facts.shape == (max(stages, default=1), 2, len(requests))
    assert (np.diff(facts[:, 0], axis=0) >= 0).all()
    for layer in range(LAYERS):
        variant = None if plan is None else plan.variant_at(layer)
        for index, request in enumerate(requests):
            missing = max(
                (int(gone) for first, gone in facts[:, :, index] if first <= layer), default=0
            )
            seen = max(0, request.num_computed + count - missing)
            if variant is None:
                assert seen == request.num_computed + count
            elif index in variant.requests:
                at = variant.requests.tolist().index(index)
                places = variant.positions[variant.row_requests == index]
                assert seen == variant.seq_lens[at]
                assert places.tolist() == list(range(seen - count, seen))
            else:
                assert seen == 0


@pytest.mark.parametrize("scheduled", [1, 3])
def test_a_captured_decode_step_has_as_many_tokens_of_each_request(scheduled: int) -> None:
    requests = [ScheduledRequest(9, 2, None), ScheduledRequest(9, scheduled, None)]
    with pytest.raises(ValueError, match=f"request 1 of the step has {scheduled} .* 0 has 2; in a"):
        decode_facts(requests, LAYERS)


def test_a_captured_decode_step_has_rows_of_all_tokens_or_of_none() -> None:
    """No request with a policy ends in an image, behind which drafts would come."""
    policy = FlowPolicy(((Stage(2),),))
    layout = TokenLayout.of(policy, ImageSpans.from_ranges([(2, 6)]))
    for token, missing in ((2, EVERYTHING), (0, 0), (6, 4)):
        facts = decode_facts([ScheduledRequest(token, 2, layout)], LAYERS)
        assert facts[0, :, 0].tolist() == [2, missing]
    with pytest.raises(ValueError, match="request 0 of the step has 2 tokens, of which 1 are"):
        decode_facts([ScheduledRequest(5, 2, layout)], LAYERS)


@pytest.mark.parametrize("tokens", [64, 576, 2880])
def test_a_layout_is_made_of_few_ranges_or_looked_up(tokens: int) -> None:
    """The same prompt again, as front end, scheduler and worker ask for it, shares its stages."""
    policy = FlowPolicy(((Stage(2, Fraction(1, 2), "uniform"), Stage(9)),))
    image = ImageSpans.from_ranges([(35, 35 + tokens)])
    one, other = TokenLayout.of(policy, [image], 700), TokenLayout.of(policy, [image], 900)
    assert one is not None and other is not None and one.stages is other.stages
    assert [evicted_at(one.evicted_tokens(), layer) for layer in (0, 2, 9)] == [
        0,
        tokens - tokens // 2,
        tokens,
    ]


def test_what_is_computed_in_parts_cannot_be_ranked() -> None:
    policy = FlowPolicy(((Stage(2, 3, "last_image"),),))
    layout = TokenLayout.of(policy, [ImageSpans.from_ranges([(4, 12)])], 15)
    assert layout is not None and layout.atomic == ((4, 12),)
    assert [layout.shortened_chunk(0, n) for n in (4, 5, 11, 12)] == [4, 4, 4, 12]
    assert layout.shortened_chunk(4, 7) == 0
    assert [n for n in range(16) if not layout.may_end_at(n)] == [5, 6]
    with pytest.raises(ValueError, match="tokens 4 to 12 must be computed in one step"):
        plan_step([ScheduledRequest(0, 11, layout)])
    with pytest.raises(ValueError, match="in one step"):
        plan_step([ScheduledRequest(6, 9, layout)])


def test_a_rank_by_the_whole_prompt_reaches_from_the_first_image_to_its_end() -> None:
    policy = FlowPolicy(((Stage(2, 3, "last_prompt"),),))
    images = [ImageSpans.from_ranges([r]) for r in ((4, 12), (14, 20))]
    layout = TokenLayout.of(policy, images, 25)
    assert layout is not None and layout.atomic == ((4, 25), (14, 25)) and layout.shareable == 4
    assert [n for n in range(26) if not layout.may_end_at(n)] == [5, 6, 15, 16]
    # Others find the text before the images, and who has the same prompt finds the rest.
    assert layout.last_end(25, 2) == 4
    same, other = (replace(layout, digest=digest) for digest in (b"same", b"other"))
    assert same.last_end(25, 2) == 24 and same.last_end(17, 2) == 14
    assert same.key(b"x", 4) == other.key(b"x", 4) == b"x"
    assert len({same.key(b"x", 5), other.key(b"x", 5), same.key(b"y", 5), b"x"}) == 4
    with pytest.raises(ValueError, match="how long"):
        TokenLayout.of(policy, images)
    with pytest.raises(ValueError, match="tokens 4 to 25 must be computed in one step"):
        plan_step([ScheduledRequest(0, 24, layout)])
    named = plan_step([ScheduledRequest(0, 25, replace(layout, pictures=("one", "other")))])
    assert named is not None
    assert [ranking.picture for ranking in named.variants[0].rankings] == ["one", "other"]


@pytest.mark.parametrize(
    ("stages", "ordered"),
    [
        # As far as the first stage keeps, which a later one of the same rank goes by.
        ((Stage(1, 9, "diversity"), Stage(3, 4, "diversity")), [9, 9]),
        # All of it where others have chosen before.
        ((Stage(1, 9, "last_image"), Stage(3, 4, "diversity")), [0, 12]),
        (
            (Stage(1, 9, "diversity"), Stage(2, 7, "last_image"), Stage(3, 4, "diversity")),
            [9, 0, 12],
        ),
        ((Stage(1, 9, "uniform"), Stage(3, 4, "diversity")), [12]),
        # Nothing to choose where all stays.
        ((Stage(1, 12, "diversity"), Stage(2, 4, "diversity"), Stage(3, 4, "diversity")), [4]),
    ],
)
def test_a_picture_is_put_in_order_only_as_far_as_a_stage_needs(
    stages: tuple[Stage, ...], ordered: list[int]
) -> None:
    layout = TokenLayout.of(FlowPolicy((stages,)), ImageSpans.from_ranges([(2, 14)]), 20)
    assert layout is not None
    assert [choice.ordered for stage in layout.stages for choice in stage.choices] == ordered
