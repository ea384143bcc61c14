"""A step's plan on the stages of a pipeline, each of which is given all rows: the same rows reach the same layers, of
choices of a device as well, of which a stage knows what the one before tells it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.staged_cases import Case as Staged
from tests.unit.staged_cases import apply, cases, choosing, chunks, made
from tests.unit.test_last_layer import AT_EVERY_CLIFF, Batch, scheduled
from tests.unit.test_plan import LAYERS, batches, decode_batches
from vllm_flow.handing_on import NOTHING, Handing, Key, Part, What, handing
from vllm_flow.last_layer import LastLayer, spare_last_layers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.policy_keys import parse_policy
from vllm_flow.ranks import RANKS, PictureRank, QuestionRank, TowerRank
from vllm_flow.rewriting import late_readings
from vllm_flow.spans import ImageSpans
from vllm_flow.step import Ranking, ScheduledRequest, StepPlan, Variant, scheduled_request

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


@st.composite
def choosing_batches(draw: st.DrawFn) -> list[tuple[Staged, int, int]]:
    """Requests with the range of tokens that the step computes, most of them of images to choose among."""
    batch = []
    for case in draw(st.lists(choosing() | cases(), min_size=1, max_size=4)):
        start, end = draw(st.sampled_from([*pairwise(draw(chunks(case)))] or [(0, case.length)]))
        batch.append((case, start, end))
    return batch


class Worker:
    """A worker that knows of choices what its own layers show, and what it is told."""

    def __init__(self, plan: StepPlan, layers: range, batch: list[tuple[Staged, int, int]]) -> None:
        self.layers, self.own = layers, plan.of_layers(layers)
        self.handing = handing(plan, [], [f"{n}" for n in range(len(batch))], layers, LAYERS)
        self.batch, self.alive = [(case, start) for case, start, _ in batch], {}
        self.starts = np.cumsum([0, *(end - start for _, start, end in batch)]).tolist()
        self.lengths: dict[tuple[What, Key], int] = {}
        self.rows = np.arange(plan.num_rows)

    def run(self, told: tuple[Part, ...], rows: np.ndarray) -> tuple[tuple[Part, ...], np.ndarray]:
        """Run all layers, given what the stage before tells; what this one tells."""
        assert self.handing.told == told
        self.lengths = {(part.what, part.key): part.length for part in told}
        for layer in self.layers:
            if layer == self.layers.start and (What.ROWS, ()) in self.lengths:
                assert len(rows) == self.lengths[What.ROWS, ()]
                self.rows = rows
            else:
                self.leave(layer)
            self.alive[layer] = self.rows.tolist()
        self.leave(self.layers.stop)
        return self.handing.tells, self.rows

    def leave(self, layer: int) -> None:
        for variant in () if self.own is None else self.own.variants:
            if variant.first_layer == layer and variant.gather is not None:
                gather = variant.gather.copy()
                for ranking in variant.rankings:
                    self.assert_knows(ranking, layer)
                    part = slice(ranking.target, ranking.target + ranking.choice.keep)
                    chosen = made(ranking, self.rows, self.batch, self.starts)
                    gather[part] = ranking.source + chosen
                self.rows = self.rows[gather]

    def assert_knows(self, ranking: Ranking, layer: int) -> None:
        choice = ranking.choice
        rank, key = RANKS[choice.rank], (ranking.request, choice.image, choice.rank)
        if choice.picks is not None:
            return
        assert not rank.reads_layer or layer - 1 in self.layers
        if self.layers.start == 0:
            return
        if isinstance(rank, PictureRank | TowerRank):
            assert self.lengths[What.ORDER, key] >= choice.ordered
        if isinstance(rank, QuestionRank) and rank.weights is not None:
            assert self.lengths[What.WEIGHTS, key] == ranking.question


def of_ranks(*ranks: tuple[int, str]) -> Staged:
    """A request of ten image tokens whose stages begin at these layers."""
    policy = FlowPolicy((tuple(Stage(layer, 9 - layer, rank) for layer, rank in ranks),))
    return Staged(14, 13, (tuple(range(1, 11)),), policy, tuple(map(float, range(13))))


PLACE_AT_THE_BORDER = of_ranks((2, "diversity"), (3, "random"))
"""Rows leave by place right at a border, among those that a device chose before."""
OTHERS = [(of_ranks((4, rank)), 0, 13) for rank in ("diversity", "cls_attention", "raters")]
"""Of each of several requests something else is told."""


@settings(max_examples=300)
@given(choosing_batches(), EDGES, st.booleans())
@example([(PLACE_AT_THE_BORDER, 0, 13)], [0, 3, 6], False)
@example([(PLACE_AT_THE_BORDER, 0, 13)], [0, 1, 3, 6], True)
@example(OTHERS, [0, 2, 3, 6], True)
def test_stages_that_are_told_choose_what_one_worker_chooses(
    batch: list[tuple[Staged, int, int]], edges: list[int], spares: bool
) -> None:
    requests = [ScheduledRequest(a, b - a, case.layout) for case, a, b in batch]
    plan = plan_step(requests)
    if plan is None:
        return
    if spares:
        plan = spare_last_layers(plan, requests)
    told, rows, looks = (), np.arange(plan.num_rows), None
    for first, end in pairwise(edges):
        stage = Worker(plan, range(first, end), batch)
        told, rows = stage.run(told, rows)
        for layer, alive in stage.alive.items():
            assert alive == apply(plan, layer, stage.batch, stage.starts)
        if looks is None:
            # Of whatever is known on the first stage alone, that one has looked.
            looks = {(r.request, r.choice.image, r.choice.rank) for r in stage.handing.looks}
            assert looks == {part.key for part in told if part.what is not What.ROWS}
    assert told == ()


@settings(max_examples=25)
@given(choosing_batches())
def test_a_worker_with_all_layers_is_told_nothing(batch: list[tuple[Staged, int, int]]) -> None:
    plan = plan_step([ScheduledRequest(a, b - a, case.layout) for case, a, b in batch])
    assert handing(plan, [], [], range(LAYERS), LAYERS) is NOTHING
    assert not NOTHING


@settings(max_examples=25)
@given(choosing_batches())
def test_nothing_is_told_of_a_step_behind_the_images(
    batch: list[tuple[Staged, int, int]],
) -> None:
    requests = [ScheduledRequest(case.prompt, 1, case.layout) for case, _, _ in batch]
    found = handing(plan_step(requests), [], [], range(2, 4), LAYERS)
    assert found == Handing() and not found


def test_what_was_read_for_a_late_eviction_is_told_all_later_stages() -> None:
    policy = parse_policy(
        {"flow_stages": "1:60% last_prompt, 4:20% last_prompt", "flow_when": "decode"}, LAYERS
    )
    image = ImageSpans.from_ranges([(2, 12)])
    layout = TokenLayout.of(policy, image, 15)
    assert layout is not None and layout.read_layers == (0, 3)
    # The prompt's last chunk, beside a request that evicts nothing.
    shares = [(7, 1, None), (9, 6, layout)]
    requests = [scheduled_request(*share) for share in shares]
    plan = plan_step(requests)
    read, ids = list(late_readings(plan, shares)), ["other", "late"]

    def masses(parts: tuple[Part, ...]) -> list[tuple[Key, int]]:
        assert all(part.what is What.MASS for part in parts)
        return [(part.key, part.length) for part in parts]

    first, middle, last = (
        handing(plan, read, ids, layers, LAYERS) for layers in (range(3), range(3, 4), range(4, 6))
    )
    assert masses(first.tells) == masses(middle.told) == [(("late", 0), 15)]
    assert masses(middle.tells) == masses(last.told) == [(("late", 0), 15), (("late", 3), 15)]
    assert not first.looks and not last.tells
