"""The search as a state machine: what it asks, what it may answer, how often it errs, what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.eval.cliff.bounds import Loss, loss_limits
from vllm_flow.eval.cliff.search import (
    Ask,
    Finding,
    Plan,
    exhaustive_answer,
    exhaustive_requests,
    order,
    search,
)


class Simulated:
    """Answers of known quality: `changes[layer, question]` is 1 for lost, -1 for gained, 0 for the same."""

    def __init__(self, changes: np.ndarray) -> None:
        self.changes = changes
        self.asked = np.zeros(changes.shape, dtype=bool)
        self.asks: list[Ask] = []

    def loss(self, layer: int, first: int, last: int, confidence: float) -> Loss:
        assert self.asked[layer, first:last].all(), "judged on questions that were never asked"
        count = last - first
        return loss_limits(self.changes[layer, first:last] / count, 1 / count, count, confidence)

    def run(self, plan: Plan) -> Finding:
        steps = search(plan, self.loss)
        try:
            while True:
                ask = next(steps)
                self.asks.append(ask)
                self.asked[ask.layer, ask.first : ask.last] = True
        except StopIteration as stop:
            return stop.value

    @property
    def requests(self) -> int:
        """Answers asked for, the baseline's once per question asked."""
        return int(self.asked.sum() + self.asked.any(axis=0).sum())


def draw(rng: np.random.Generator, losses: Sequence[float], noise: float, items: int) -> np.ndarray:
    """Changes with these true losses, and `noise` of the questions gained."""
    uniform = rng.random((len(losses), items))
    lost = uniform < np.clip(np.array(losses)[:, None] + noise, 0, 1 - noise)
    return lost.astype(float) - (uniform > 1 - noise)


@st.composite
def cases(drawing: st.DrawFn) -> tuple[Plan, np.ndarray]:
    layers, items = drawing(st.integers(1, 20)), drawing(st.integers(2, 60))
    explored = drawing(st.integers(1, items - 1))
    tolerance = drawing(st.sampled_from([0.01, 0.05, 0.2, 0.5]))
    rate = drawing(st.sampled_from([0.0, 0.02, 0.2]))
    rng = np.random.default_rng(drawing(st.integers(0, 2**32)))
    changes = rng.choice([1.0, -1.0, 0.0], (layers, items), p=[rate, rate / 2, 1 - 1.5 * rate])
    if drawing(st.booleans()):  # a cliff, rather than any curve
        changes[: drawing(st.integers(0, layers))] = 1.0
    return Plan(layers, items, explored, tolerance), changes


@given(cases())
@settings(max_examples=100, deadline=None)
def test_what_a_search_asks_and_answers(case: tuple[Plan, np.ndarray]) -> None:
    plan, changes = case
    engine = Simulated(changes)
    finding = engine.run(plan)
    for ask in engine.asks:
        assert 0 <= ask.layer < plan.num_layers and 0 <= ask.first < ask.last <= plan.items
    # Nothing looks at the held-back questions before the order of the tests is fixed.
    exploring = [ask.last for ask in engine.asks if ask.why == "explore"]
    assert all(last <= plan.explored for last in exploring)
    tested = [test.layer for test in finding.tests]
    assert tested == sorted(tested, reverse=True) and len(set(tested)) == len(tested)
    # All passed but the last, which may have failed; the answer is the last that passed.
    assert all(test.passed for test in finding.tests[:-1])
    passed = [test.layer for test in finding.tests if test.passed]
    assert finding.layer == (passed[-1] if passed else plan.num_layers)
    # The answer's test is what it says, on all of the held-back questions.
    if finding.evidence is not None:
        assert finding.evidence.loss.items == plan.items - plan.explored
        assert finding.evidence.loss.high <= plan.tolerance
        assert engine.asked[finding.layer].all()
    if finding.layer > 0 and plan.num_layers > finding.layer - 1:
        assert engine.asked[finding.layer - 1].all(), "the lower neighbour is asked everything"
    assert engine.requests <= exhaustive_requests(plan)
    # The same answers again: the same questions, the same finding.
    again = Simulated(changes)
    assert again.run(plan) == finding and again.asks == engine.asks


@given(cases(), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_the_order_of_tests_does_not_depend_on_held_back_answers(
    case: tuple[Plan, np.ndarray], seed: int
) -> None:
    plan, changes = case
    one = Simulated(changes)
    one.run(plan)
    other = changes.copy()
    other[:, plan.explored :] = np.random.default_rng(seed).choice(
        [1.0, 0.0, -1.0], other[:, plan.explored :].shape
    )
    two = Simulated(other)
    two.run(plan)
    first, second = ([a for a in e.asks if a.why == "explore"] for e in (one, two))
    assert first == second
    tests = [[a.layer for a in e.asks if a.why == "confirm"] for e in (one, two)]
    shorter = min(map(len, tests))
    assert tests[0][:shorter] == tests[1][:shorter]


@given(st.integers(1, 40), st.data())
@settings(deadline=None)
def test_order_goes_from_deep_to_shallow_and_ends_at_zero(layers: int, data: st.DataObject) -> None:
    proposed = data.draw(st.integers(0, layers))
    found = order(proposed, layers)
    assert found == sorted(set(found), reverse=True)
    assert found[-1] == 0 and max(found) < layers
    assert set(range(min(proposed, layers - 1) + 1)) <= set(found)
    fallbacks = {proposed + more for more in (1, 3, 8) if proposed + more < layers}
    assert {layer for layer in found if layer > proposed} == fallbacks


@given(cases())
@settings(max_examples=50, deadline=None)
def test_no_layer_is_explored_twice_and_the_proposed_one_stands_between_bad_and_good(
    case: tuple[Plan, np.ndarray],
) -> None:
    """Whatever the curve: every layer that looked bad is shallower than the proposed one, all that looked good are
    not, and so no test begins at a layer that looked bad."""
    plan, changes = case
    engine = Simulated(changes)
    finding = engine.run(plan)
    last: dict[int, int] = {}
    for ask in engine.asks:
        if ask.why == "explore":
            assert ask.last > last.get(ask.layer, 0), "asked for nothing new"
            last[ask.layer] = ask.last
    assert [a.layer for a in engine.asks if a.why == "explore" and a.last <= 32] == list(last)
    for layer, asked in last.items():
        loss = engine.loss(layer, 0, asked, 0.9)
        good = loss.high <= plan.tolerance or loss.value <= plan.tolerance >= loss.low
        assert good == (layer >= finding.proposed)
    assert {finding.proposed - 1, finding.proposed} - {-1, plan.num_layers} <= last.keys()


def test_batches_double_until_a_layer_is_decided_or_all_is_asked() -> None:
    """A loss just at the tolerance is never clear."""
    plan = Plan(1, 400, 200, 0.5)
    changes = np.tile([1.0, 0.0], 200)[None]
    engine = Simulated(changes)
    engine.run(plan)
    assert [ask.last for ask in engine.asks if ask.why == "explore"] == [32, 64, 128, 200]


@given(cases())
@settings(max_examples=30, deadline=None)
def test_a_clean_cliff_is_found_where_the_sweep_finds_it(case: tuple[Plan, np.ndarray]) -> None:
    plan, _ = case
    for cliff in range(plan.num_layers + 1):
        changes = np.zeros((plan.num_layers, plan.items))
        changes[:cliff] = 1.0
        held_back = plan.items - plan.explored
        if loss_limits([], 1 / held_back, held_back).high > plan.tolerance:
            return
        engine = Simulated(changes)
        finding = engine.run(plan)
        assert (finding.layer, finding.proposed) == (cliff, cliff)
        told = [layer for layer in (cliff, cliff - 1) if 0 <= layer < plan.num_layers]
        assert [ask.layer for ask in engine.asks if ask.why == "complete"] == told
        engine.asked[:] = True
        assert exhaustive_answer(plan, engine.loss) == cliff
        assert engine.requests == exhaustive_requests(plan)


def test_a_sweep_is_judged_on_all_questions_at_the_full_confidence() -> None:
    """From the deepest layer down, one after the other, to the first that fails."""
    judged = []

    def judge(layer: int, first: int, last: int, confidence: float) -> Loss:
        judged.append((layer, first, last, confidence))
        return Loss(0.0, 0.0, 0.1 if layer > 1 else 0.3, last - first)

    assert exhaustive_answer(Plan(5, 40, 10, 0.2, 0.99), judge) == 2
    assert judged == [(layer, 0, 40, 0.99) for layer in (4, 3, 2, 1)]


CURVES = {
    "steep": [0.5] * 8 + [0.0] * 22,
    "gradual": [0.4 * 0.75**layer for layer in range(30)],
    "on the tolerance": [0.5] * 5 + [0.0101] * 25,
    "just above, then none": [0.5] * 5 + [0.0101] * 12 + [0.0] * 13,
    "up and down": [0.5, 0.3, 0.0, 0.2, 0.0, 0.0101, 0.0, 0.05, 0.0, 0.0101] + [0.0, 0.0101] * 10,
}


@pytest.mark.parametrize(
    ("name", "noise"),
    [*((name, 0.0) for name in CURVES), ("on the tolerance", 0.005), ("up and down", 0.005)],
)
def test_wrong_answers_are_as_rare_as_promised(name: str, noise: float) -> None:
    """100 searches per curve at 1 % and 90 %: an answer whose true loss is above may come in 10 %."""
    losses, runs = CURVES[name], 100
    plan = Plan(len(losses), 1600, 400, 0.01, 0.9)
    rng = np.random.default_rng(11)
    wrong, requests = 0, 0
    for _ in range(runs):
        engine = Simulated(draw(rng, losses, noise, plan.items))
        layer = engine.run(plan).layer
        wrong += layer < plan.num_layers and losses[layer] > plan.tolerance
        requests += engine.requests
    # Three standard errors of the simulation above the promised rate.
    assert wrong / runs <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / runs)
    assert requests / runs < 0.45 * exhaustive_requests(plan)


def test_on_a_steep_curve_the_cliff_is_found_at_a_fifth_of_the_cost() -> None:
    plan = Plan(30, 1600, 400, 0.01, 0.95)
    rng = np.random.default_rng(3)
    found, costs = [], []
    for _ in range(40):
        engine = Simulated(draw(rng, CURVES["steep"], 0.0, plan.items))
        found.append(engine.run(plan).layer)
        costs.append(engine.requests / exhaustive_requests(plan))
    assert set(found) == {8}
    assert np.mean(costs) < 0.25


@pytest.mark.parametrize(
    "values", [(0, 10, 3, 0.1), (5, 10, 0, 0.1), (5, 10, 10, 0.1), (5, 10, 3, 0.0)]
)
def test_impossible_plans_are_refused(values: tuple[int, int, int, float]) -> None:
    with pytest.raises(ValueError):
        Plan(*values)
