"""The step plan against a naive model that moves one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.block_counts import predict_blocks
from vllm_flow.boundaries import blocks_taken, packed_boundaries, packed_boundary
from vllm_flow.grouping import DecoderLayers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy
from vllm_flow.profile.ideal import row_count_ideal
from vllm_flow.spans import ImageSpans
from vllm_flow.step import ScheduledRequest, StepPlan

LAYERS = 6


@dataclass(frozen=True)
class Case:
    """A request of ``length`` tokens; ``image`` are its evictable positions."""

    length: int
    image: frozenset[int]
    cliff: int | None

    @property
    def layout(self) -> TokenLayout | None:
        policy = None if self.cliff is None else FlowPolicy.withdrawal(self.cliff)
        return TokenLayout.of(policy, ImageSpans.from_ranges((p, p + 1) for p in self.image))

    def alive(self, position: int, layer: int) -> bool:
        return self.cliff is None or layer < self.cliff or position not in self.image

    def rank(self, position: int, layer: int) -> int:
        return sum(self.alive(p, layer) for p in range(position))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = draw(st.integers(1, 30))
    image = draw(st.frozensets(st.integers(0, length - 1), max_size=length))
    return Case(length, image, draw(st.none() | st.integers(0, LAYERS - 1)))


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[Case, int, int]]:
    """Requests with the range of tokens that the step computes."""
    batch = []
    for case in draw(st.lists(cases(), min_size=1, max_size=5)):
        start = draw(st.integers(0, case.length - 1))
        batch.append((case, start, draw(st.integers(start + 1, case.length))))
    return batch


@st.composite
def decode_batches(draw: st.DrawFn) -> list[tuple[Case, int, int]]:
    """Requests with one token each, most of them past their images."""
    batch = []
    for case in draw(st.lists(cases(), min_size=1, max_size=5)):
        first = max(case.image, default=-1) + 1
        start = draw(st.just(first) | st.integers(0, case.length - 1))
        batch.append((Case(max(case.length, start + 1), case.image, case.cliff), start, start + 1))
    return batch


def plan_of(batch: list[tuple[Case, int, int]]) -> StepPlan | None:
    return plan_step([ScheduledRequest(a, b - a, case.layout) for case, a, b in batch])


@settings(max_examples=150)
@given(batches() | decode_batches())
def test_every_layer_of_a_plan_matches_the_naive_model(batch: list[tuple[Case, int, int]]) -> None:
    plan = plan_of(batch)
    tokens = [(r, p) for r, (_, a, b) in enumerate(batch) for p in range(a, b)]
    if all(case.layout is None for case, _, _ in batch):
        assert plan is None
        return
    assert plan is not None and plan.num_rows == len(tokens)
    assert plan.seq_lens.tolist() == [end for _, _, end in batch]
    for layer in range(LAYERS):
        expected = [
            (row, r, batch[r][0].rank(p, layer))
            for row, (r, p) in enumerate(tokens)
            if batch[r][0].alive(p, layer)
        ]
        variant = plan.variant_at(layer)
        if variant is None:
            assert len(expected) == len(tokens)
            assert all(rank == tokens[row][1] for row, _, rank in expected)
            continue
        rows = range(plan.num_rows) if variant.rows is None else variant.rows.tolist()
        found = zip(rows, variant.row_requests.tolist(), variant.positions.tolist(), strict=True)
        assert list(found) == expected
        present = sorted({r for _, r, _ in expected})
        assert variant.requests.tolist() == present
        lengths = [sum(r == q for _, r, _ in expected) for q in present]
        assert np.diff(variant.query_start_loc).tolist() == lengths
        stored = [batch[q][0].rank(batch[q][2], layer) for q in present]
        assert variant.seq_lens.tolist() == stored
        assert variant.max_query_len == max(lengths, default=0)
        assert variant.max_seq_len == max(stored, default=0)


@settings(max_examples=150)
@given(batches() | decode_batches())
def test_a_state_goes_on_where_no_row_leaves_and_some_came_before(
    batch: list[tuple[Case, int, int]],
) -> None:
    plan = plan_of(batch)
    for variant in plan.variants if plan else ():
        layer = variant.first_layer
        expected = all(
            all(case.alive(p, layer) for p in range(first, end)) and case.rank(first, layer) > 0
            for case, first, end in batch
        )
        assert variant.continues_states == expected


@given(batches())
def test_gathers_compose_to_the_rows(batch: list[tuple[Case, int, int]]) -> None:
    plan = plan_of(batch)
    alive = np.arange(sum(b - a for _, a, b in batch))
    for variant in plan.variants if plan else ():
        if variant.gather is not None:
            alive = alive[variant.gather]
        rows = np.arange(plan.num_rows) if variant.rows is None else variant.rows
        assert alive.tolist() == rows.tolist()


@settings(max_examples=100)
@given(cases(), st.data())
def test_chunking_never_changes_where_tokens_are_stored(case: Case, data: st.DataObject) -> None:
    cuts = data.draw(
        st.sets(st.integers(1, case.length - 1)) if case.length > 1 else st.just(set())
    )
    edges = [0, *sorted(cuts), case.length]
    for layer in range(LAYERS):
        stored: list[int] = []
        for start, end in zip(edges, edges[1:], strict=False):
            plan = plan_of([(case, start, end)])
            variant = plan.variant_at(layer) if plan else None
            stored += range(start, end) if variant is None else variant.positions.tolist()
        # Packed positions are a bijection onto 0..kept-1, in order, wherever the chunks end.
        assert stored == list(range(sum(case.alive(p, layer) for p in range(case.length))))


@given(cases(), st.integers(1, 8), st.sampled_from([1, 2, 3, 6]))
def test_block_needs_match_a_naive_model(case: Case, block_size: int, group_layers: int) -> None:
    starts = DecoderLayers(LAYERS).group_starts(group_layers)
    for tokens in range(case.length + 1):
        expected = []
        for start in starts:
            # A group must hold a token if any of its layers sees it.
            held = sum(
                any(case.alive(p, layer) for layer in range(start, start + group_layers))
                for p in range(tokens)
            )
            expected.append(-(-held // block_size))
        assert predict_blocks(tokens, case.layout, starts, block_size) == tuple(expected)


@settings(max_examples=100)
@given(cases(), st.integers(1, 6))
def test_boundaries_name_every_packed_block_once(case: Case, block_size: int) -> None:
    """Going through a prompt block by block, the packed blocks fill up one after the other."""
    layout = case.layout
    if layout is None:
        return
    completed = []
    for num_blocks in range(1, case.length // block_size + 1):
        boundary = packed_boundary(layout.stages[-1].evicted, num_blocks, block_size)
        kept = sum(case.alive(p, LAYERS - 1) for p in range(num_blocks * block_size))
        if boundary.completed is not None:
            completed = [*completed[: boundary.completed], boundary.completed]
        # Every prefix with kept tokens ends in a block of its own name, and no other block gets one.
        assert (boundary.completed, boundary.tail) != (None, None) or not kept
        filled = (
            kept // block_size
            > sum(case.alive(p, LAYERS - 1) for p in range((num_blocks - 1) * block_size))
            // block_size
        )
        ends_full = kept > 0 and kept % block_size == 0
        assert (boundary.completed is not None) == (filled or ends_full)
        # All full blocks were named, in order, and the tail is the block behind them.
        assert completed == list(range(boundary.full_blocks)) == list(range(kept // block_size))
        assert boundary.tail == (kept // block_size if kept % block_size else None)


@given(cases(), st.integers(1, 6), st.data())
def test_boundaries_are_the_same_one_by_one(
    case: Case, block_size: int, data: st.DataObject
) -> None:
    if case.layout is None:
        return
    evicted = case.layout.stages[0].evicted
    first = data.draw(st.integers(1, case.length // block_size + 1))
    last = data.draw(st.integers(first - 1, case.length // block_size + 3))
    one_by_one = [packed_boundary(evicted, n, block_size) for n in range(first, last + 1)]
    assert packed_boundaries(evicted, first, last, block_size) == one_by_one


def test_a_step_of_image_tokens_only_leaves_no_row() -> None:
    case = Case(10, frozenset(range(2, 8)), 3)
    plan = plan_of([(case, 3, 6)])
    assert plan is not None
    (variant,) = plan.variants
    assert variant.num_rows == 0 and variant.requests.tolist() == []
    assert variant.query_start_loc.tolist() == [0]


def test_a_policy_on_a_prompt_without_image_plans_nothing() -> None:
    assert TokenLayout.of(FlowPolicy.withdrawal(0), ImageSpans()) is None
    assert plan_of([(Case(5, frozenset(), 2), 0, 5)]) is None


def test_row_count_ideal_of_the_prototype() -> None:
    """16 layers, 589 tokens, 576 of them image: the figures in the design notes."""
    ideal = [
        row_count_ideal(num_layers=16, cliff=c, prompt_tokens=589, image_tokens=576)
        for c in (2, 4, 6, 16)
    ]
    assert [round(x, 2) for x in ideal] == [6.93, 3.75, 2.57, 1.0]


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_a_hit_that_takes_over_needs_no_more_than_no_hit(
    idle: list[bool], shared: int, more: int
) -> None:
    """One block at a time: what the request holds in the end, and what of it was free before."""
    required, shared = len(idle) + more, min(shared, len(idle))
    taken = {True: 0, False: 0}
    for take_over in taken:
        for index in range(required):
            hit, free = index < len(idle), index >= len(idle) or idle[index]
            written = hit and index >= shared
            taken[take_over] += free
            if written and not (take_over and free):
                taken[take_over] += 1  # its copy
        assert blocks_taken(required, idle, shared, take_over=take_over) == taken[take_over]
    assert taken[True] <= required
    assert taken[True] <= taken[False]
