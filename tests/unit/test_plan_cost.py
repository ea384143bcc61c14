"""A step of many requests with many cliffs: its plan is put together from theirs, in few lines per request."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.staged_cases import Case, cases, chunks
from vllm_flow import plan as planning
from vllm_flow.layout import TokenLayout
from vllm_flow.mutual import reached, stored
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans
from vllm_flow.step import ScheduledRequest


@st.composite
def steps(draw: st.DrawFn) -> list[ScheduledRequest]:
    """Prefills, and decodes of a token or some, of some layouts that several requests share."""
    found: list[ScheduledRequest] = []
    known: list[Case] = draw(st.lists(cases(), min_size=1, max_size=3))
    for _ in range(draw(st.integers(1, 8))):
        case = draw(st.sampled_from(known))
        if draw(st.booleans()):
            ends = draw(chunks(case))
            at = draw(st.integers(0, max(len(ends) - 2, 0)))
            first, end = ends[at], ends[min(at + 1, len(ends) - 1)]
        else:
            first = case.prompt + draw(st.integers(0, 3))
            end = first + draw(st.integers(1, 3))
        if first < end:
            spans = ImageSpans.from_ranges((p, p + 1) for image in case.images for p in image)
            mutual = reached(spans.ranges, first, end) if draw(st.booleans()) else ()
            found.append(ScheduledRequest(first, end - first, case.layout, mutual))
    return found


@settings(max_examples=150, deadline=None)
@given(steps())
def test_a_batch_is_planned_as_its_requests_are(batch: list[ScheduledRequest]) -> None:
    plan = plan_step(batch)
    alone = [plan_step([request]) for request in batch]
    if plan is None:
        assert not any(alone)
        return
    layers = {variant.first_layer for one in alone if one is not None for variant in one.variants}
    assert [variant.first_layer for variant in plan.variants] == sorted(layers)
    starts = np.cumsum([0, *(request.num_scheduled for request in batch)])
    assert plan.num_rows == starts[-1]
    for variant in plan.variants:
        rows, positions, owners, lengths, rankings, mutual = [], [], [], [], [], {}
        for index, (request, one) in enumerate(zip(batch, alone, strict=True)):
            own = None if one is None else one.variant_at(variant.first_layer)
            computed, scheduled = request.num_computed, request.num_scheduled
            if own is None:
                own_rows, own_positions = range(scheduled), range(computed, computed + scheduled)
                own_lengths = [computed + scheduled]
                left = stored(request.mutual, None)
            else:
                own_rows = range(scheduled) if own.rows is None else own.rows.tolist()
                own_positions, own_lengths = own.positions.tolist(), own.seq_lens.tolist()
                left = own.mutual.get(0, ())
                if own.first_layer == variant.first_layer:
                    rankings += [(index, ranking.choice) for ranking in own.rankings]
            if left and own_rows:
                mutual[len(set(owners))] = left
            rows += [int(starts[index]) + row for row in own_rows]
            positions += own_positions
            owners += [index] * len(own_rows)
            lengths += own_lengths
        kept = range(plan.num_rows) if variant.rows is None else variant.rows.tolist()
        assert list(kept) == rows
        assert variant.positions.tolist() == positions
        assert variant.row_requests.tolist() == owners
        assert variant.requests.tolist() == sorted(set(owners))
        assert variant.seq_lens.tolist() == lengths
        assert variant.mutual == mutual
        assert [(r.request, r.choice) for r in variant.rankings] == rankings


def lines_of_planning(batch: list[ScheduledRequest]) -> int:
    """Lines that run in the module, once per turn of a loop."""
    lines = 0

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != planning.__file__:
            return None
        lines += event == "line"
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        plan_step(batch)
    finally:
        sys.settrace(before)
    return lines


def test_decodes_beside_prefills_cost_the_same_whatever_their_cliffs() -> None:
    """Not their number times that of the cliffs in the batch."""
    image = ImageSpans.from_ranges([(5, 105)])
    layouts = [TokenLayout.of(FlowPolicy.withdrawal(cliff), image, 120) for cliff in range(1, 31)]
    prefills = [ScheduledRequest(0, 120, layout) for layout in layouts[:6]]
    spent = []
    for count in (30, 240):
        decodes = [ScheduledRequest(130, 1, layouts[at % 30]) for at in range(count)]
        spent.append(lines_of_planning(decodes + prefills))
    assert spent[1] - spent[0] < 210 * 30, "one line of each per cliff would be as many"
    assert spent[1] - spent[0] < 210 * 15
