"""Which (layer, questions) to ask next, and which layer is shown to lose no more than tolerated. (pure)

Knows layers, ranges of questions and limits of losses; nothing of engines, tasks or files.

The questions lie in a random order and are split. *Exploration* may look at its part as often as it
likes: bisection over the layers, each asked in growing batches until its loss is clearly above or below
the tolerance. It proposes a layer and an order of tests. *Confirmation* tests on the other part, which
nothing has looked at: a deeper layer first, then ever shallower ones, each on all questions of the part
and once, at the full confidence, until one fails. The answer is the last that passed.

Guarantee: whatever the curve looks like, the answer's true loss exceeds the tolerance with probability
at most 1 - confidence, as far as the limits of a single loss keep their level. For the order is fixed
before its data are seen, and a wrong answer needs the first bad layer of the order to pass ("fixed
sequence testing": Maurer, Hothorn and Lehmacher, in Biometrie in der chemisch-pharmazeutischen Industrie
6 (1995) 3-18; with an order learnt from other data: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn
then Test", arXiv 2110.01052). So no correction for many layers, and none for peeking, is needed. That
deeper layers lose less is *not* assumed here. It is assumed for saving: on a curve that goes up and down,
the answer may not be the smallest layer that would pass, and it is still one that keeps the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal

from vllm_flow.eval.cliff.bounds import Loss

EXPLORED = 0.25
"""Share of the questions for exploration."""

FIRST_BATCH = 32
"""Questions that exploration asks a layer first; doubled until the layer is decided."""

CLEAR = 0.9
"""Confidence at which exploration takes a layer for decided. It costs questions, not correctness."""

FALLBACKS = (8, 3, 1)
"""How much deeper than the proposed layer the tests of the confirmation begin: where the proposed one
fails, the answer is the next of them."""


@dataclass(frozen=True)
class Ask:
    """Questions `first` to `last` (excluded) at one layer; those that have answers cost nothing."""

    layer: int
    first: int
    last: int
    why: Literal["explore", "confirm", "complete"]


@dataclass(frozen=True)
class Plan:
    """What a search is about."""

    num_layers: int
    """A cliff at this layer is the baseline."""
    items: int
    """Questions, in random order."""
    explored: int
    """The first so many are for exploration, the others for confirmation."""
    tolerance: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.num_layers < 1 or not 0 < self.explored < self.items or self.tolerance <= 0:
            raise ValueError(f"no search can be made of {self}")


Judge = Callable[[int, int, int, float], Loss]
"""(layer, first, last, confidence) -> the loss on these questions, all of which have been asked."""


@dataclass(frozen=True)
class Test:
    """One test of the confirmation."""

    layer: int
    loss: Loss
    passed: bool


@dataclass
class Finding:
    """What a search found."""

    layer: int
    """The answer; the number of layers where no layer is shown to keep the tolerance."""
    tests: list[Test] = field(default_factory=list)
    """In their order; all passed but perhaps the last."""
    proposed: int = 0
    """What exploration proposed."""

    @property
    def evidence(self) -> Test | None:
        """The answer's own test."""
        return next((test for test in self.tests if test.layer == self.layer), None)


def search(plan: Plan, judge: Judge) -> Generator[Ask, None, Finding]:
    """A state machine: yields what to ask; resumed once it is answered; returns the finding.

    What it asks depends on nothing but the plan and what `judge` says of questions asked before, so a
    search that is run again on the same answers asks the same.
    """
    # Bisection: `bad` looks bad (or is before the first layer), `good` looks good (or is the baseline).
    bad, good = -1, plan.num_layers
    while good - bad > 1:
        middle = (bad + good) // 2
        if (yield from _explore(plan, judge, middle)):
            good = middle
        else:
            bad = middle
    finding = Finding(plan.num_layers, proposed=good)
    for layer in order(good, plan.num_layers):
        yield Ask(layer, plan.explored, plan.items, "confirm")
        loss = judge(layer, plan.explored, plan.items, plan.confidence)
        finding.tests.append(Test(layer, loss, loss.high <= plan.tolerance))
        if not finding.tests[-1].passed:
            break
        finding.layer = layer
    # Estimates on all questions, for the reader; they decide nothing.
    for layer in (finding.layer, finding.layer - 1):
        if 0 <= layer < plan.num_layers:
            yield Ask(layer, 0, plan.items, "complete")
    return finding


def order(proposed: int, num_layers: int) -> list[int]:
    """The layers in the order of the confirmation's tests, down to layer 0; the first failure ends it.

    None of them deeper than the proposed one looked bad in the exploration: bisection goes up from such a layer.
    """
    deeper = [proposed + more for more in FALLBACKS if proposed + more < num_layers]
    return [*deeper, *range(min(proposed, num_layers - 1), -1, -1)]


def _explore(plan: Plan, judge: Judge, layer: int) -> Generator[Ask, None, bool]:
    """Whether a layer looks as if it kept the tolerance."""
    last = min(FIRST_BATCH, plan.explored)
    while True:
        yield Ask(layer, 0, last, "explore")
        loss = judge(layer, 0, last, CLEAR)
        if loss.low > plan.tolerance:
            return False
        if loss.high <= plan.tolerance:
            return True
        if last == plan.explored:
            return loss.value <= plan.tolerance
        last = min(2 * last, plan.explored)


def exhaustive_requests(plan: Plan) -> int:
    """Requests of a sweep that asks every question at every layer and of the baseline."""
    return plan.items * (plan.num_layers + 1)


def exhaustive_answer(plan: Plan, judge: Judge) -> int:
    """What a sweep of every layer says: from the deepest layer down, the last that passes before one fails.

    Judged on all questions. The order is fixed beforehand, so that it has the same guarantee.
    """
    answer = plan.num_layers
    for layer in range(plan.num_layers - 1, -1, -1):
        if judge(layer, 0, plan.items, plan.confidence).high > plan.tolerance:
            break
        answer = layer
    return answer
