"""Rows that leave one layer early, but for their keys and values, against a naive model of each token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.staged_cases import Case as Staged
from tests.unit.staged_cases import cases as staged_cases
from tests.unit.staged_cases import chunks
from tests.unit.test_plan import LAYERS, Case, batches, decode_batches
from vllm_flow.last_layer import LastLayer, spare_last_layers
from vllm_flow.plan import plan_step
from vllm_flow.step import ScheduledRequest, StepPlan, Variant

Batch = list[tuple[Case, int, int]]


def scheduled(batch: Batch) -> list[ScheduledRequest]:
    return [ScheduledRequest(a, b - a, case.layout) for case, a, b in batch]


def plans_of(batch: Batch) -> tuple[StepPlan, StepPlan] | None:
    """As every layer runs whole, and as the last ones are spared."""
    requests = scheduled(batch)
    plan = plan_step(requests)
    return None if plan is None else (plan, spare_last_layers(plan, requests))


def computed(case: Case, position: int, layer: int) -> bool:
    """Whether a token's row runs through a layer."""
    return case.alive(position, layer) and case.alive(position, layer + 1)


PICTURE = frozenset({1, 2, 3, 4})
AT_EVERY_CLIFF = [(Case(7, PICTURE, cliff), 0, 7) for cliff in range(5)]


@settings(max_examples=100)
@given(batches() | decode_batches())
@example(AT_EVERY_CLIFF)
def test_every_layer_of_a_spared_plan_matches_the_naive_model(batch: Batch) -> None:
    # The last layer that sees an image may be the model's last.
    batch = [
        (replace(c, cliff=LAYERS) if c.cliff == 0 and c.length % 2 == 0 else c, a, b)
        for c, a, b in batch
    ]
    plans = plans_of(batch)
    if plans is None:
        return
    plan = plans[1]
    assert all(0 <= variant.first_layer <= LAYERS for variant in plan.variants)
    tokens = [(r, p) for r, (_, a, b) in enumerate(batch) for p in range(a, b)]
    before = list(range(len(tokens)))
    for layer in range(LAYERS):
        whole = [
            (row, r, batch[r][0].rank(p, layer))
            for row, (r, p) in enumerate(tokens)
            if batch[r][0].alive(p, layer)
        ]
        expected = [
            (row, r, rank) for row, r, rank in whole if computed(batch[r][0], tokens[row][1], layer)
        ]
        last = [(row, before.index(row), r, rank) for row, r, rank in set(whole) - set(expected)]
        entering, before = before, [row for row, _, _ in expected]
        variant = plan.variant_at(layer)
        if variant is None:
            assert len(expected) == len(tokens) and not last
            continue
        rows = range(plan.num_rows) if variant.rows is None else variant.rows.tolist()
        found = zip(rows, variant.row_requests.tolist(), variant.positions.tolist(), strict=True)
        assert list(found) == expected
        if variant.first_layer == layer:
            gather = range(len(entering)) if variant.gather is None else variant.gather
            assert [entering[i] for i in gather] == [row for row, _, _ in expected]
        stored = ()
        if isinstance(variant, LastLayer):
            keys = variant.last
            assert variant.first_layer == layer and len(keys.rows)
            stored = (keys.rows, keys.gather, keys.row_requests, keys.positions)
        assert list(zip(*(part.tolist() for part in stored), strict=True)) == sorted(last)
        assert seen_by_a_causal_kernel(variant) == [(r, rank + 1) for _, r, rank in expected]


def seen_by_a_causal_kernel(variant: Variant) -> list[tuple[int, int]]:
    """(request, keys read) of each row: query i of a run reads seq_len - query_len + i + 1."""
    edges = variant.query_start_loc.tolist()
    assert edges[0] == 0 and edges[-1] == variant.num_rows
    runs = zip(
        variant.requests.tolist(), variant.seq_lens.tolist(), edges[:-1], edges[1:], strict=True
    )
    return [
        (request, length - (end - start) + i + 1)
        for request, length, start, end in runs
        for i in range(end - start)
    ]


@given(st.sets(st.integers(1, 90), min_size=1, max_size=5))
def test_variants_are_in_the_order_of_their_layers_in_models_of_any_depth(cliffs: set[int]) -> None:
    plans = plans_of([(Case(7, PICTURE, cliff), 0, 7) for cliff in cliffs])
    assert plans is not None
    firsts = [variant.first_layer for variant in plans[1].variants]
    assert firsts == sorted(cliffs | {cliff - 1 for cliff in cliffs})


@given(decode_batches())
def test_a_step_in_which_no_row_leaves_keeps_its_plan(batch: Batch) -> None:
    plans = plans_of(batch)
    if plans is not None and all(variant.gather is None for variant in plans[0].variants):
        assert plans[1] is plans[0]


@given(batches(), st.integers(0, LAYERS - 1))
def test_layers_from_the_cliff_on_are_as_before(batch: Batch, layer: int) -> None:
    plans = plans_of(batch)
    if plans is None:
        return
    whole, spared = (plan.variant_at(layer) for plan in plans)
    if whole is None or isinstance(spared, LastLayer):
        return
    assert spared is not None
    for name in ("rows", "row_requests", "positions", "requests", "query_start_loc", "seq_lens"):
        one, other = getattr(whole, name), getattr(spared, name)
        assert one is other is None or np.array_equal(one, other), name


def test_a_step_of_image_tokens_only_still_stores_their_keys() -> None:
    plans = plans_of([(Case(10, frozenset(range(2, 8)), 3), 3, 6)])
    assert plans is not None
    last, past = plans[1].variants
    assert isinstance(last, LastLayer) and (last.first_layer, past.first_layer) == (2, 3)
    assert last.last.positions.tolist() == [3, 4, 5]
    for variant in (last, past):
        assert variant.num_rows == 0 and variant.requests.tolist() == []
        assert variant.query_start_loc.tolist() == [0]


def test_text_around_images_is_given_in_runs() -> None:
    """Two tokens, an image, one token, an image, three tokens, all in one step."""
    plans = plans_of([(Case(13, frozenset({2, 3, 4, 6, 7, 8, 9}), 2), 0, 13)])
    assert plans is not None
    variant = plans[1].variant_at(1)
    assert isinstance(variant, LastLayer)
    assert variant.query_start_loc.tolist() == [0, 2, 3, 6]
    assert variant.seq_lens.tolist() == [2, 6, 13]
    assert variant.requests.tolist() == [0, 0, 0]


@given(batches(), st.integers(1, LAYERS - 1))
def test_nothing_is_spared_where_the_device_chooses_rows(batch: Batch, chosen: int) -> None:
    """From the first such variant on, the plan is as it was; before it, as if there were none."""
    plans = plans_of(batch)
    if plans is None or all(v.first_layer < chosen for v in plans[0].variants):
        return
    mixed = tuple(
        v if v.first_layer < chosen else replace(v, rankings=("an image's",))  # type: ignore[arg-type]
        for v in plans[0].variants
    )
    made = spare_last_layers(replace(plans[0], variants=mixed), scheduled(batch))
    past = [v for v in made.variants if v.rankings]
    assert [id(v) for v in past] == [id(v) for v in mixed if v.rankings]
    for layer in range(LAYERS):
        variant, whole, spared = (p.variant_at(layer) for p in (made, *plans))
        last_before = any(v.first_layer == layer + 1 for v in past)
        if layer >= past[0].first_layer or last_before:
            assert not isinstance(variant, LastLayer)
            continue
        assert type(variant) is type(spared) or variant is whole


@settings(max_examples=60, deadline=None)
@given(st.lists(staged_cases(), min_size=1, max_size=3), st.data())
def test_stages_that_keep_tokens_are_spared_where_the_host_knows_them(
    batch: list[Staged], data: st.DataObject
) -> None:
    """Every step of prompts in chunks, under policies of several stages and ranks."""
    ends = [data.draw(chunks(case)) for case in batch]
    for step in range(max(map(len, ends)) - 1):
        requests = [
            ScheduledRequest(own[step], own[step + 1] - own[step], case.layout)
            for case, own in zip(batch, ends, strict=True)
            if step + 1 < len(own)
        ]
        plan = plan_step(requests)
        if plan is not None:
            assert_the_same_tokens(plan, spare_last_layers(plan, requests), requests)


def assert_the_same_tokens(
    plan: StepPlan, spared: StepPlan, requests: list[ScheduledRequest]
) -> None:
    """Each layer stores what it stored; rows that would leave behind it run no further than that."""
    tokens = [
        (index, position)
        for index, r in enumerate(requests)
        for position in range(r.num_computed, r.num_computed + r.num_scheduled)
    ]
    chosen = min((v.first_layer for v in plan.variants if v.rankings), default=LAYERS + 1)
    leaving = {v.first_layer for v in plan.variants if v.gather is not None} - {0}

    def stored(of: StepPlan, layer: int) -> dict[int, tuple[int, int]]:
        """Row -> (request, position in storage)."""
        variant = of.variant_at(layer)
        if variant is None:
            return dict(enumerate(tokens))
        rows = range(of.num_rows) if variant.rows is None else variant.rows.tolist()
        places = zip(variant.row_requests.tolist(), variant.positions.tolist(), strict=True)
        return dict(zip(rows, places, strict=True))

    for layer in range(LAYERS):
        whole, variant = stored(plan, layer), spared.variant_at(layer)
        if layer + 1 not in leaving or layer + 1 >= chosen:
            assert stored(spared, layer) == whole and not isinstance(variant, LastLayer)
            continue
        assert isinstance(variant, LastLayer)
        goes_on = {row: whole[row] for row in whole if row in stored(plan, layer + 1)}
        last = variant.last
        places = zip(last.row_requests.tolist(), last.positions.tolist(), strict=True)
        keys = dict(zip(last.rows.tolist(), places, strict=True))
        assert stored(spared, layer) == goes_on and goes_on | keys == whole
        assert seen_by_a_causal_kernel(variant) == [(r, p + 1) for r, p in goes_on.values()]
