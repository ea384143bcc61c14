"""How often the judge errs, for headlines that are no means: POPE's F1 and CHAIR_i, over simulated answers.

A simulated model has a true metric under the baseline and at a layer, so that the true loss is known. A layer
whose true loss is just above the tolerance must pass with a probability of at most 1 - confidence, and one
that loses nothing must pass nearly always. Pictures carry several questions, and some pictures are harder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom

from vllm_flow.eval.cliff.evidence import Evidence
from vllm_flow.eval.tasks import Item, get_task
from vllm_flow.eval.tasks.pope import CATEGORIES

LAYERS, LAYER = 4, 2
CONFIDENCE = 0.95

Simulation = Callable[[np.random.Generator], Evidence]


@dataclass(frozen=True)
class Pope:
    """Answers to six questions per picture: in each category one whose answer is yes, one no.

    The layer turns right answers wrong with probability `harm`, and wrong ones right with `gain`; both only in
    a share `where` of the pictures, and accordingly more often there.
    """

    pictures: int
    harm_yes: float
    harm_no: float
    gain: float = 0.0
    where: float = 1.0
    right_yes: tuple[float, ...] = (0.85, 0.85, 0.85)
    right_no: tuple[float, ...] = (0.97, 0.95, 0.88)

    def loss(self) -> float:
        """The true loss of F1, of infinitely many questions."""
        before, after = [], []
        for yes, no in zip(self.right_yes, self.right_no, strict=True):
            before.append(f1(yes, no))
            after.append(
                f1(
                    yes * (1 - self.harm_yes) + (1 - yes) * self.gain,
                    no * (1 - self.harm_no) + (1 - no) * self.gain,
                )
            )
        return float(np.mean(before) - np.mean(after))

    def __call__(self, rng: np.random.Generator) -> Evidence:
        task = get_task("pope")
        items, answers = [], []
        touched = rng.random(self.pictures) < self.where
        for picture in range(self.pictures):
            scale = touched[picture] / self.where
            for category, yes, no in zip(CATEGORIES, self.right_yes, self.right_no, strict=True):
                for label, right, harm in (
                    ("yes", yes, self.harm_yes),
                    ("no", no, self.harm_no),
                ):
                    name = f"{category}/{picture}-{label}"
                    items.append(Item(name, "?", f"{picture}", {"label": label}, category))
                    before = rng.random() < right
                    flips = rng.random() < scale * (harm if before else self.gain)
                    answers.append((label, before, before != flips))
        evidence = Evidence(task, items, LAYERS)
        for item, (label, before, after) in zip(items, answers, strict=True):
            for layer, right in ((LAYERS, before), (LAYER, after)):
                says = (label == "yes") == right
                evidence.add(item.id, layer, "Yes" if says else "No", None)
        return evidence


def f1(right_yes: float, right_no: float) -> float:
    """F1 where half of the questions are to be answered with yes."""
    return 2 * right_yes / (2 * right_yes + (1 - right_no) + (1 - right_yes))


@dataclass(frozen=True)
class Chair:
    """Captions that name `shown` objects of the picture and each of `tempting` absent ones with a probability.

    The layer names more of them, `more` each, in a share `where` of the pictures only.
    """

    pictures: int
    more: float
    where: float = 1.0
    shown: int = 5
    tempting: int = 4
    before: float = 0.15

    def loss(self) -> float:
        """The true rise of CHAIR_i: of the ratio of expectations, which the ratio of sums tends to."""
        wrong = [self.tempting * p for p in (self.before, self.before + self.more)]
        return wrong[1] / (self.shown + wrong[1]) - wrong[0] / (self.shown + wrong[0])

    def __call__(self, rng: np.random.Generator) -> Evidence:
        task = get_task("chair")
        here = ["dog", "cat", "horse", "sheep", "cow"][: self.shown]
        absent = ["car", "boat", "train", "bicycle"][: self.tempting]
        items = [Item(str(n), "?", f"{n}", {"objects": here}) for n in range(self.pictures)]
        evidence = Evidence(task, items, LAYERS)
        for item in items:
            scale = (rng.random() < self.where) / self.where
            named = rng.random(self.tempting) < self.before
            later = rng.random(self.tempting) < scale * self.more / (1 - self.before)
            for layer, extra in ((LAYERS, named), (LAYER, named | later)):
                words = [*here, *np.array(absent)[extra]]
                evidence.add(item.id, layer, " ".join(words), None)
        return evidence


def passed(simulation: Simulation, tolerance: float, times: int, seed: int = 0) -> int:
    """How many of the simulated samples show a loss within the tolerance."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(times):
        evidence = simulation(rng)
        found += evidence.loss(LAYER, 0, len(evidence.items), CONFIDENCE).high <= tolerance
    return found


def at_loss(make: Callable[[float], Pope | Chair], tolerance: float) -> Pope | Chair:
    """The simulation whose true loss is just above the tolerance, where errors are most frequent."""
    return make(brentq(lambda x: make(x).loss() - 1.001 * tolerance, 0, 0.6))


LOSSY = {
    "F1, images are missed": (lambda x: Pope(100, x, 0.0), 0.04),
    "F1, as little as so few pictures can show": (lambda x: Pope(100, x, 0.0), 0.031),
    "F1, says yes too often": (lambda x: Pope(100, 0.0, x), 0.04),
    "F1, changes both ways": (lambda x: Pope(100, x, x, gain=0.08), 0.04),
    "F1, in one picture of ten": (lambda x: Pope(100, x, x, where=0.1), 0.04),
    "F1, whole pictures": (lambda x: Pope(100, x, x, where=x), 0.031),
    "CHAIR_i": (lambda x: Chair(200, x), 0.02),
    "CHAIR_i, in one picture of ten": (lambda x: Chair(200, x, where=0.1), 0.015),
}
TIMES = 40


LONG = ("CHAIR_i, in one picture of ten",)
"""Of a kind with another one that make test runs."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in LOSSY]
)
def test_a_loss_above_the_tolerance_passes_no_more_often_than_allowed(name: str) -> None:
    make, tolerance = LOSSY[name]
    simulation = at_loss(make, tolerance)
    assert simulation.loss() > tolerance
    allowed = binom.ppf(0.999, TIMES, 1 - CONFIDENCE)
    assert passed(simulation, tolerance, TIMES) <= allowed


@pytest.mark.parametrize(
    ("simulation", "tolerance"),
    [(Pope(100, 0.004, 0.002, gain=0.01), 0.04), (Chair(200, 0.001), 0.02)],
    ids=["F1", "CHAIR_i"],
)
def test_a_layer_that_loses_next_to_nothing_passes(
    simulation: Pope | Chair, tolerance: float
) -> None:
    assert 0 < simulation.loss() < tolerance / 5
    assert passed(simulation, tolerance, 20) >= 18
