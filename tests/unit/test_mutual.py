"""Ranges of tokens that see one another, against masks made token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_flow.layout import TokenLayout
from vllm_flow.mutual import reached, shortened_chunk, stored
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.spans import ImageSpans, Range
from vllm_flow.step import ScheduledRequest, StepPlan

LAYERS = 4


@dataclass(frozen=True)
class Case:
    """A prompt of text and pictures; ``gone`` are the image tokens that are gone from a layer on."""

    length: int
    pictures: tuple[Range, ...]
    gone: dict[int, frozenset[int]]

    def alive(self, layer: int) -> list[int]:
        gone = frozenset().union(*(g for first, g in self.gone.items() if first <= layer))
        return [p for p in range(self.length) if p not in gone]

    def sees(self, query: int, key: int) -> bool:
        """The definition: what is before, and what is of the same picture."""
        return key <= query or any(
            start <= query < stop and start <= key < stop for start, stop in self.pictures
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), max_size=3))
    pictures, position = [], 0
    for text, picture in lengths:
        pictures.append((position + text, position + text + picture))
        position += text + picture
    image = [p for start, stop in pictures for p in range(start, stop)]
    gone: dict[int, frozenset[int]] = {}
    for first in sorted(draw(st.sets(st.integers(0, LAYERS - 1), max_size=2))) if image else ():
        gone[first] = draw(st.frozensets(st.sampled_from(image)))
    return Case(position + draw(st.integers(1, 4)), tuple(pictures), gone)


def evicted(case: Case, layer: int) -> ImageSpans:
    left = set(case.alive(layer))
    return ImageSpans.from_ranges((p, p + 1) for p in range(case.length) if p not in left)


def mask(query: int, key: int, ranges: tuple[Range, ...]) -> bool:
    """What an attention kernel makes of positions in storage."""
    return key <= query or any(a <= query < b and a <= key < b for a, b in ranges)


@settings(max_examples=200)
@given(cases(), st.integers(0, LAYERS - 1))
def test_kept_tokens_see_each_other_as_in_the_prompt(case: Case, layer: int) -> None:
    alive = case.alive(layer)
    ranges = stored(case.pictures, evicted(case, layer))
    for query, at in enumerate(alive):
        for key, other in enumerate(alive):
            assert mask(query, key, ranges) == case.sees(at, other), (query, key)
    if len(alive) == case.length:
        assert ranges == stored(case.pictures, None)


@settings(max_examples=200)
@given(cases(), st.data())
def test_a_step_needs_the_ranges_it_reaches_and_no_others(case: Case, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, case.length - 1))
    end = data.draw(st.integers(first + 1, case.length))
    ranges = reached(case.pictures, first, end)
    for query in range(first, end):
        for key in range(case.length):
            assert mask(query, key, ranges) == case.sees(query, key)
    for one in ranges:
        assert set(range(first, end)) & set(range(*one))


@settings(max_examples=200)
@given(cases(), st.integers(5, 9), st.lists(st.integers(1, 9), max_size=8), st.data())
def test_chunks_divide_no_picture_and_come_to_an_end(
    case: Case, budget: int, others: list[int], data: st.DataObject
) -> None:
    """Steps have room for the longest picture, the first ones for less, as others take of it; a cached prefix ends
    anywhere."""
    computed = data.draw(st.integers(0, case.length - 1))
    rooms = iter([min(room, budget) for room in others])
    while computed < case.length:
        room = next(rooms, budget)
        wanted = min(room, case.length - computed)
        tokens = shortened_chunk(case.pictures, computed, wanted)
        assert 0 <= tokens <= wanted
        assert tokens > 0 or room < budget, "a step with all its room goes on"
        end = computed + tokens
        for start, stop in case.pictures:
            assert not (tokens and max(start, computed) < end < stop)
        # No more is left out than must be.
        assert tokens == wanted or any(
            start < computed + wanted < stop for start, stop in case.pictures
        )
        computed = end


@dataclass(frozen=True)
class Request:
    """A prompt with one picture under a policy, and the tokens of it that a step computes."""

    length: int
    picture: Range
    policy: FlowPolicy | None
    first: int
    end: int

    @property
    def layout(self) -> TokenLayout | None:
        return TokenLayout.of(self.policy, ImageSpans((self.picture,)), self.length)

    def stored(self, layer: int) -> list[int]:
        """Positions that the layer has of the tokens up to the step's end, in order."""
        layout = self.layout
        gone = None if layout is None else layout.evicted(layer)
        return [p for p in range(self.end) if gone is None or not gone.is_image(p)]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    start, tokens, after = draw(st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(1, 4)))
    picture, length = (start, start + tokens), start + tokens + after
    stages = draw(
        st.none()
        | st.lists(
            st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 4)),
            max_size=2,
            unique_by=lambda s: s[0],
        ).map(lambda found: sorted(found))
    )
    policy = None
    if stages:
        amounts = sorted((keep for _, keep in stages), reverse=True)
        kept = zip(stages, amounts, strict=True)
        found = (Stage(layer, keep, "uniform" if keep else None) for (layer, _), keep in kept)
        policy = FlowPolicy((tuple(found),))
    first = draw(st.integers(0, length - 1))  # a cached prefix ends anywhere
    end = draw(st.sampled_from([e for e in (start, picture[1], length) if e > first]))
    return Request(length, picture, policy, first, end)


ONLY_EVICTED = Request(9, (1, 8), FlowPolicy(((Stage(0, 2, "uniform"),),)), 7, 8)
"""Two tokens of its picture are stored, and the step has none of them."""


@settings(max_examples=200)
@given(st.lists(requests(), min_size=1, max_size=4))
@example([ONLY_EVICTED, Request(6, (0, 1), None, 1, 6)])
def test_every_layer_of_a_plan_sees_what_the_prompt_says(batch: list[Request]) -> None:
    plan = plan_step(
        [
            ScheduledRequest(
                r.first, r.end - r.first, r.layout, reached([r.picture], r.first, r.end)
            )
            for r in batch
        ]
    )
    for layer in range(LAYERS):
        variant = None if plan is None else plan.variant_at(layer)
        if variant is None:
            continue  # stock vLLM's, with stock ranges
        for index, (request, seq_len) in enumerate(
            zip(variant.requests.tolist(), variant.seq_lens.tolist(), strict=True)
        ):
            asked = batch[request]
            there = asked.stored(layer)
            assert len(there) == seq_len
            rows = slice(*variant.query_start_loc[index : index + 2].tolist())
            ranges = variant.mutual.get(index, ())
            for query in variant.positions[rows].tolist():
                found = [mask(query, key, ranges) for key in range(seq_len)]
                case = Case(asked.length, (asked.picture,), {})
                assert found == [case.sees(there[query], key) for key in there]
    check_sizes(plan)


def check_sizes(plan: StepPlan | None) -> None:
    for variant in () if plan is None else plan.variants:
        found: NDArray[np.int64] = np.array(sorted(variant.mutual), dtype=np.int64)
        assert ((found >= 0) & (found < len(variant.requests))).all()
