"""A step's plan on the stages of a pipeline, each of which is given all rows: the same rows reach the same layers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_last_layer import AT_EVERY_CLIFF, Batch, scheduled
from tests.unit.test_plan import LAYERS, batches, decode_batches
from vllm_flow.last_layer import LastLayer, spare_last_layers
from vllm_flow.plan import plan_step
from vllm_flow.step import StepPlan, Variant

Run = dict[int, tuple[list[int], list[int], list[int]]]
"""Layer -> the rows that run through it, their positions in storage, and rows of which only keys are stored."""

EDGES = st.lists(st.integers(1, LAYERS - 1), max_size=3, unique=True).map(
    lambda cuts: [0, *sorted(cuts), LAYERS]
)


def run(plan: StepPlan | None, layers: range, num_rows: int) -> Run:
    """What a worker does that goes by gathers alone, from all rows of the step on."""
    found, alive = {}, np.arange(num_rows)
    variant: Variant | None = None
    for layer in layers:
        begins = [v for v in (() if plan is None else plan.variants) if v.first_layer == layer]
        last: list[int] = []
        if begins:
            (variant,) = begins
            if isinstance(variant, LastLayer):
                last = alive[variant.last.gather].tolist()
                assert last == variant.last.rows.tolist()
            if variant.gather is not None:
                alive = alive[variant.gather]
        positions = [] if variant is None else variant.positions.tolist()
        found[layer] = (alive.tolist(), positions, last)
    return found


@settings(max_examples=200)
@given(batches() | decode_batches() | st.just(AT_EVERY_CLIFF), EDGES, st.booleans())
def test_stages_one_after_the_other_do_what_one_worker_does(
    batch: Batch, edges: list[int], spares: bool
) -> None:
    requests = scheduled(batch)
    plan = plan_step(requests)
    if plan is None:
        return
    if spares:
        plan = spare_last_layers(plan, requests)
    alone = run(plan, range(LAYERS), plan.num_rows)
    for first, end in pairwise(edges):
        layers = range(first, end)
        own = plan.of_layers(layers)
        assert run(own, layers, plan.num_rows) == {n: alone[n] for n in layers}
        if own is None:
            assert plan.variant_at(end - 1) is None
            continue
        assert all(variant.first_layer in layers for variant in own.variants)
        for layer in layers:
            whole, part = plan.variant_at(layer), own.variant_at(layer)
            assert (whole is None) == (part is None)
            if whole is not None and part is not None:
                assert part.seq_lens is whole.seq_lens and part.rows is whole.rows


@given(batches())
def test_a_worker_with_all_layers_keeps_the_plan(batch: Batch) -> None:
    plan = plan_step(scheduled(batch))
    if plan is not None and all(variant.first_layer < LAYERS for variant in plan.variants):
        assert plan.of_layers(range(LAYERS)) is plan
