"""Answers become losses: means and ratios, pictures as units, what is left out."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.eval.cliff.bounds import Loss, loss_limits
from vllm_flow.eval.cliff.evidence import (
    RESAMPLES,
    CliffError,
    Evidence,
    in_random_order,
    split_at,
)
from vllm_flow.eval.statistics.bootstrap import bca_limits, resampling
from vllm_flow.eval.tasks import Item, Task, get_task
from vllm_flow.eval.tasks.base import Metrics, Scored, Totals

LAYERS = 4


class Share(Task):
    """Right or wrong, the headline is the share of right answers."""

    name = "share"
    max_tokens = 4
    headline = "accuracy"

    def read(self, data: object) -> list[Item]:
        raise NotImplementedError

    def score(self, item: Item, text: str) -> Scored:
        right = float(text == "yes")
        return Scored(item.id, text, right, {"right": right, "all": 1.0})

    def metrics(self, totals: Totals) -> Metrics:
        return {"accuracy": totals["right"] / totals["all"]}


class Wrong(Share):
    """The share of wrong answers: lower is better."""

    headline = "wrong"
    higher_is_better = False

    def metrics(self, totals: Totals) -> Metrics:
        return {"wrong": 1 - totals["right"] / totals["all"]}


def items(count: int, per_picture: int = 1) -> list[Item]:
    return [Item(str(n), "?", f"{n // per_picture}.png", {}) for n in range(count)]


def filled(task: Task, asked: list[Item], before: list[bool], after: list[bool]) -> Evidence:
    evidence = Evidence(task, asked, LAYERS)
    for item, b, a in zip(asked, before, after, strict=True):
        evidence.add(item.id, LAYERS, "yes" if b else "no", None)
        evidence.add(item.id, 1, "yes" if a else "no", None)
    return evidence


ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


@given(ANSWERS)
@settings(deadline=None)
def test_a_mean_has_the_limits_of_lost_and_gained_answers(pairs: list[tuple[bool, bool]]) -> None:
    before, after = ([pair[k] for pair in pairs] for k in (0, 1))
    count = len(pairs)
    evidence = filled(Share(), items(count), before, after)
    found = evidence.loss(1, 0, count, 0.9)
    lost = [float(b) - float(a) for b, a in pairs]
    limits = loss_limits(np.array(lost) / count, 1 / count, count, 0.9)
    # A share cannot fall by more than all of it.
    assert (found.low, found.high) == (max(limits.low, -1), min(limits.high, 1))
    assert (found.value, found.items) == (limits.value, count)
    assert evidence.score(LAYERS) == pytest.approx(np.mean(before))
    assert evidence.all_asked(1, 0.9) == found


def test_answers_about_one_picture_are_one_unit() -> None:
    before, after = [True] * 60, [False] * 6 + [True] * 54
    single = filled(Share(), items(60), before, after).loss(1, 0, 60, 0.95)
    together = filled(Share(), items(60, per_picture=6), before, after).loss(1, 0, 60, 0.95)
    assert [single.value, together.value] == pytest.approx([0.1, 0.1])
    assert together.high > single.high + 0.05


def test_where_lower_is_better_a_rise_is_a_loss() -> None:
    before, after = [True] * 50, [False] * 10 + [True] * 40
    found = filled(Wrong(), items(50), before, after).loss(1, 0, 50, 0.95)
    assert found.value == pytest.approx(0.2)
    assert 0 < found.low < 0.2 < found.high < 0.4


@given(ANSWERS)
@settings(max_examples=40, deadline=None)
def test_a_ratio_has_the_wider_of_both_limits(pairs: list[tuple[bool, bool]]) -> None:
    """Of a share told as a ratio, what each question adds is known without a jackknife: its own change."""
    before, after = ([pair[k] for pair in pairs] for k in (0, 1))
    count = len(pairs)
    found = filled(Wrong(), items(count), before, after).loss(1, 0, count, 0.9)
    lost = np.array([float(b) - float(a) for b, a in pairs])
    limits = [loss_limits(lost / count, 1 / count, count, 0.9, count)]
    seed = np.random.SeedSequence(0)
    samples = np.concatenate([w @ lost for w in resampling(count, RESAMPLES, seed)]) / count
    if np.ptp(samples) > 0:
        # The jackknife of the mean; one-sided limits at 90 % are two-sided ones at 80 %.
        low, high = bca_limits(lost.mean(), samples, (lost.sum() - lost) / (count - 1), 0.8)
        limits.append(Loss(found.value, low, high, count))
    assert found.value == pytest.approx(lost.mean())
    assert found.low == pytest.approx(max(min(one.low for one in limits), -1))
    assert found.high == pytest.approx(min(max(one.high for one in limits), 1))


def pope(count: int, seed: int) -> tuple[list[Item], list[str]]:
    rng = random.Random(seed)
    asked, labels = [], []
    for n in range(count):
        label = rng.choice(["yes", "no"])
        group = ("random", "popular", "adversarial")[n % 3]
        asked.append(Item(f"{group}/{n}", "?", f"{n // 6}.png", {"label": label}, group))
        labels.append(label)
    return asked, labels


def other(label: str) -> str:
    return "no" if label == "yes" else "yes"


def spoken(label: str) -> str:
    return {"yes": "Yes", "no": "No"}[label]


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.4]))
@settings(max_examples=25, deadline=None)
def test_the_loss_of_a_ratio_is_that_of_the_metric_itself(seed: int, flip: float) -> None:
    task = get_task("pope")
    asked, labels = pope(60, seed)
    rng = random.Random(seed + 1)
    evidence = Evidence(task, asked, LAYERS)
    said: dict[int, list[str]] = {LAYERS: [], 2: []}
    for item, label in zip(asked, labels, strict=True):
        first = other(label) if rng.random() < 0.1 else label
        second = other(first) if rng.random() < flip else first
        for layer, answer in ((LAYERS, first), (2, second)):
            said[layer].append(answer)
            evidence.add(item.id, layer, spoken(answer), None)

    def f1(layer: int) -> float:
        values = []
        for group in ("random", "popular", "adversarial"):
            at = [n for n, item in enumerate(asked) if item.group == group]
            tp = sum(said[layer][n] == labels[n] == "yes" for n in at)
            fp = sum(said[layer][n] == "yes" != labels[n] for n in at)
            fn = sum(said[layer][n] == "no" != labels[n] for n in at)
            values.append(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
        return float(np.mean(values))

    found = evidence.loss(2, 0, 60, 0.95)
    assert found.value == pytest.approx(f1(LAYERS) - f1(2), abs=1e-9)
    assert found.low <= found.value <= found.high
    if said[2] == said[LAYERS]:
        # Nothing changed: no width by resampling, yet the limit is that of what was not seen.
        assert found.high == pytest.approx(-np.log(0.05) / 10), "ten pictures, six questions each"


def test_a_question_that_nothing_can_answer_is_left_out() -> None:
    evidence = Evidence(Share(), items(4), LAYERS)
    assert evidence.missing(1, 0, 4) == [0, 1, 2, 3]
    evidence.add("2", LAYERS, None, "image unreadable: 2.png")
    evidence.add("2", 1, None, "image unreadable: 2.png")
    for n in "013":
        evidence.add(n, LAYERS, "yes", None)
        evidence.add(n, 1, "no" if n == "0" else "yes", None)
    assert evidence.missing(1, 0, 4) == []
    assert evidence.loss(1, 0, 4, 0.95).items == 3
    assert evidence.loss(1, 0, 4, 0.95).value == pytest.approx(1 / 3)
    assert (evidence.pictures(), evidence.pictures(1), evidence.pictures(3)) == (3, 2, 1)
    with pytest.raises(CliffError, match="2.png"):
        evidence.loss(1, 2, 3, 0.95)


def test_what_only_the_baseline_cannot_answer_is_left_out_of_what_is_told_as_well() -> None:
    """A question that a layer answers and the baseline does not, whichever of the two comes first."""
    for order in (1, -1):
        evidence = Evidence(Share(), items(3), LAYERS)
        for layer, text in ((LAYERS, None), (1, "no"))[::order]:
            evidence.add("1", layer, text, None if text else "too long")
        assert evidence.layers == []
        for n in "02":
            evidence.add(n, LAYERS, "yes", None)
            evidence.add(n, 1, "yes" if n == "0" else "no", None)
        assert (evidence.score(1), evidence.score(LAYERS)) == (0.5, 1.0)
        told = evidence.all_asked(1, 0.9)
        assert (told.value, told.items) == (0.5, 2) and told == evidence.loss(1, 0, 3, 0.9)


def test_layers_are_those_with_answers_in_order() -> None:
    evidence = Evidence(Share(), items(2), LAYERS)
    assert evidence.layers == []
    for layer in (LAYERS, 3, 1):
        evidence.add("0", layer, "yes", None)
    assert evidence.layers == [1, 3, LAYERS]
    assert evidence.score(1) == 1.0 and evidence.all_asked(1, 0.9).items == 1


def test_an_error_at_one_layer_only_stops_the_search() -> None:
    evidence = Evidence(Share(), items(2), LAYERS)
    evidence.add("0", LAYERS, "yes", None)
    with pytest.raises(CliffError, match="question 0 at layer 1: the engine ended it"):
        evidence.add("0", 1, None, "the engine ended it")


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 99), st.floats(0.05, 0.9))
@settings(deadline=None)
def test_pictures_are_never_split(count: int, per_picture: int, seed: int, share: float) -> None:
    asked = items(count, per_picture)
    ordered = in_random_order(asked, seed)
    assert sorted(item.id for item in ordered) == sorted(item.id for item in asked)
    assert ordered == in_random_order(asked, seed)
    at = split_at(ordered, share)
    assert at >= share * count - 1
    assert not {i.image for i in ordered[:at]} & {i.image for i in ordered[at:]}


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 99), st.integers(1, 60))
@settings(deadline=None)
def test_a_limit_takes_as_many_pictures_as_it_can(
    count: int, per_picture: int, seed: int, limit: int
) -> None:
    asked = items(count, per_picture)
    taken = in_random_order(asked, seed, limit)
    assert len(taken) == len({item.id for item in taken}) == min(limit, count)
    pictures = [item.image for item in taken]
    assert len(set(pictures)) == min(limit, -(-count // per_picture))
    # Together: a picture that was left does not come again.
    assert sum(a != b for a, b in itertools.pairwise(pictures)) == len(set(pictures)) - 1
