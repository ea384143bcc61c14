"""Paired comparisons by resampling: against scipy, against exact tests, and in simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_flow.eval.statistics import bootstrap
from vllm_flow.eval.statistics.bootstrap import Comparison, compare
from vllm_flow.eval.statistics.intervals import mcnemar_p, minimum_detectable, unseen_share

Array = NDArray[Any]


def mean(totals: Mapping[str, Array]) -> dict[str, Array]:
    right, asked = totals["right"], totals["asked"]
    return {"mean": np.divide(right, asked, out=np.zeros_like(right), where=asked > 0)}


def ratio(totals: Mapping[str, Array]) -> dict[str, Array]:
    """Like CHAIR_i: a ratio of two sums, 0 where nothing is mentioned."""
    bad, all_ = totals["bad"], totals["all"]
    return {"ratio": np.divide(bad, all_, out=np.zeros_like(bad), where=all_ > 0)}


def scores(right: Array) -> Array:
    """[U] scores -> [1, U, 2] counts (right, asked)."""
    right = np.asarray(right, dtype=float)
    return np.stack([right, np.ones_like(right)], axis=-1)[None]


def one(base: Array, treat: Array, **options: Any) -> Comparison:
    return compare(["right", "asked"], scores(base), scores(treat), mean, **options)["mean"][0]


def test_the_interval_of_a_mean_is_scipys_bca() -> None:
    rng = np.random.default_rng(1)
    base = rng.beta(2, 1, 150)
    treat = np.clip(base - rng.exponential(0.1, 150), 0, 1)
    ours = one(base, treat, resamples=20_000, swaps=99).difference
    theirs = scipy.stats.bootstrap(
        (treat - base,), np.mean, n_resamples=20_000, method="BCa", rng=2
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=8e-4)


def test_the_interval_of_a_ratio_is_scipys_bca() -> None:
    rng = np.random.default_rng(5)
    counts = []
    for rate in (0.1, 0.35):
        all_ = rng.poisson(4, 90) + 1
        counts.append(np.stack([rng.binomial(all_, rate), all_], -1).astype(float))
    base, treat = counts

    def statistic(b: Array, a: Array, d: Array, c: Array, axis: int = -1) -> Array:
        return d.sum(axis) / c.sum(axis) - b.sum(axis) / a.sum(axis)

    theirs = scipy.stats.bootstrap(
        (base[:, 0], base[:, 1], treat[:, 0], treat[:, 1]), statistic, paired=True,
        n_resamples=8_000, method="BCa", rng=2,
    )  # fmt: skip
    result = compare(["bad", "all"], base[None], treat[None], ratio, resamples=20_000, swaps=99)
    ours = result["ratio"][0]
    limits = theirs.confidence_interval
    assert (ours.difference.low, ours.difference.high) == pytest.approx(limits, abs=4e-3)
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.03)
    assert ours.treatment.value == pytest.approx(treat[:, 0].sum() / treat[:, 1].sum())


@pytest.mark.parametrize("gained, lost", [(0, 6), (3, 11), (9, 9), (1, 2), (20, 44)])
def test_p_is_mcnemars_for_right_and_wrong(gained: int, lost: int) -> None:
    base = np.array([0] * gained + [1] * lost + [1] * 30 + [0] * 5)
    treat = np.array([1] * gained + [0] * lost + [1] * 30 + [0] * 5)
    p = one(base, treat, swaps=40_000, resamples=50).p_value
    exact = mcnemar_p(gained, lost)
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact / 40_000) + 5e-5)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_swapping_the_arms_mirrors_everything_but_p(pairs: list[tuple[float, float]]) -> None:
    base, treat = np.array(pairs).T
    there = one(base, treat, resamples=200, swaps=200)
    back = one(treat, base, resamples=200, swaps=200)
    assert there.difference.value == pytest.approx(np.mean(treat) - np.mean(base), abs=1e-9)
    assert there.difference.low <= there.difference.value <= there.difference.high
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.p_value == pytest.approx(back.p_value, abs=0.011)
    assert there.standard_error == pytest.approx(back.standard_error)
    assert there.treatment.value == pytest.approx(back.baseline.value)


def test_treatments_do_not_meet_and_seeds_decide() -> None:
    rng = np.random.default_rng(3)
    base, first, second = (scores(rng.integers(0, 2, 60)) for _ in range(3))
    names = ["right", "asked"]
    pair = np.concatenate([first, second])
    together = compare(names, np.concatenate([base, base]), pair, mean, seed=7, swaps=500)["mean"]
    alone = compare(names, base, second, mean, seed=7, swaps=500)["mean"]
    assert together[1] == alone[0]
    assert compare(names, base, second, mean, seed=8, swaps=500)["mean"] != alone


def test_a_unit_a_pair_lacks_counts_nothing() -> None:
    rng = np.random.default_rng(3)
    base, treat = scores(rng.integers(0, 2, 60)), scores(rng.integers(0, 2, 60))
    base[:, 50:] = treat[:, 50:] = 0
    result = compare(["right", "asked"], base, treat, mean, swaps=99)["mean"][0]
    assert result.baseline.value == pytest.approx(base[0, :50, 0].mean())


places = st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True)


@given(places, places, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_units_that_a_pair_lacks_are_not_drawn(few: list[int], more: list[int], seed: int) -> None:
    """An unfinished run answers few of many questions: intervals are those of the few by themselves, whatever
    other pairs have."""
    right = np.random.default_rng(seed).integers(0, 2, (2, 41))
    names, pairs = ["right", "asked"], []
    for known in (np.isin(np.arange(41), few), np.isin(np.arange(41), [*few, *more])):
        pairs.append([scores(arm) * known[None, :, None] for arm in right])
    base, treat = (np.concatenate(arms) for arms in zip(*pairs, strict=True))
    for found, (before, after), own in zip(
        compare(names, base, treat, mean, resamples=200, swaps=9)["mean"], pairs,
        (sorted(few), sorted({*few, *more})), strict=True,
    ):  # fmt: skip
        alone = compare(names, before[:, own], after[:, own], mean, resamples=200, swaps=9)["mean"][
            0
        ]
        assert replace(found, p_value=0) == replace(alone, p_value=0)


def test_many_units_share_their_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few errors under each of many policies do not make as many sets of draws; the interval hardly knows."""
    rng = np.random.default_rng(6)
    base, treat = (scores(rng.integers(0, 2, 220)) for _ in range(2))
    base[:, :10] = treat[:, :10] = 0
    names = ["right", "asked"]
    shared = compare(names, base, treat, mean, swaps=9)["mean"][0]
    alone = compare(names, base[:, 10:], treat[:, 10:], mean, swaps=9)["mean"][0]
    assert shared.difference.high - shared.difference.low == pytest.approx(
        alone.difference.high - alone.difference.low, rel=0.05
    )
    drawn: list[int] = []
    whole = bootstrap.resampling
    monkeypatch.setattr(
        bootstrap, "resampling", lambda units, *more: drawn.append(units) or whole(units, *more)
    )
    one = np.concatenate([base, treat, base])
    one[1, 20:] = 0  # few of the second
    compare(names, one, one, mean, swaps=9, resamples=9)
    assert drawn == [220, 10]


def test_five_lost_answers_are_no_certainty() -> None:
    """All five answered of a hundred are lost: the interval leaves room, as it does for five of five."""
    base = np.zeros((1, 100, 2))
    base[:, :5] = 1
    treat = base * [0, 1]
    found = compare(["right", "asked"], base, treat, mean, resamples=200, swaps=99)["mean"][0]
    assert found.difference.value == -1
    assert found.difference.high == pytest.approx(unseen_share(5) - 1)
    nothing = compare(["right", "asked"], 0 * base, 0 * base, mean, resamples=9, swaps=9)["mean"][0]
    assert (nothing.difference.low, nothing.difference.high) == (-1, 1)


def test_large_samples_are_resampled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    base, treat = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    whole = one(base, treat, resamples=400, swaps=400)
    monkeypatch.setattr("vllm_flow.eval.statistics.bootstrap.CHUNK", 130)
    assert one(base, treat, resamples=400, swaps=400).difference.low == pytest.approx(
        whole.difference.low, abs=0.05
    )


def test_identical_answers_leave_room_for_what_was_not_seen() -> None:
    result = one(np.ones(40), np.ones(40), resamples=99, swaps=99)
    assert result.identical and result.p_value == 1 and result.standard_error == 0
    bound = unseen_share(40)
    assert result.difference.low == pytest.approx(-bound)
    assert result.difference.high == pytest.approx(bound)
    assert (result.treatment.low, result.treatment.high) == pytest.approx((1 - bound, 1))


def test_a_share_of_nothing_is_not_negative() -> None:
    result = one(np.zeros(40), np.zeros(40), resamples=99, swaps=99)
    assert (result.treatment.low, result.treatment.high) == pytest.approx((0, unseen_share(40)))
    assert result.difference.low == pytest.approx(-unseen_share(40))


@pytest.mark.parametrize("size", [(2, 5, 3), (1, 5, 2), (2, 4, 2)])
def test_shapes_are_checked(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="treatments, units"):
        compare(["a", "b"], np.zeros((2, 5, 2)), np.zeros(size), mean)


@pytest.mark.parametrize("size", [(2, 5, 3), (5, 2), (1, 2, 5, 2)])
def test_both_shapes_are_wrong(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="treatments, units"):
        compare(["a", "b"], np.zeros(size), np.zeros(size), mean)


@pytest.mark.parametrize("size", [(1, 0, 2), (0, 5, 2)])
def test_nothing_cannot_be_compared(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        compare(["a", "b"], np.zeros(size), np.zeros(size), mean)


def test_intervals_cover_the_truth_where_questions_share_a_picture() -> None:
    """Six questions a picture: intervals over pictures hold the truth in about 95 of 100
    experiments, those over single questions in far fewer."""
    rng = np.random.default_rng(0)
    covered = {"pictures": 0, "questions": 0}
    experiments, pictures, questions, loss = 250, 50, 6, 0.1
    for number in range(experiments):
        affected = rng.random(pictures) < 2 * loss
        base = np.ones((pictures, questions))
        treat = base - (affected[:, None] & (rng.random((pictures, questions)) < 0.5))
        for name, shape in (("pictures", (1, pictures, -1)), ("questions", (1, -1, 1))):
            counts = [
                np.stack(
                    [a.reshape(shape).sum(-1), np.ones_like(a).reshape(shape).sum(-1)], axis=-1
                )
                for a in (base, treat)
            ]
            found = compare(["right", "asked"], *counts, mean, resamples=400, swaps=1, seed=number)
            difference = found["mean"][0].difference
            covered[name] += difference.low <= -loss <= difference.high
    assert 0.90 <= covered["pictures"] / experiments <= 0.98
    assert covered["questions"] / experiments < 0.85


def test_p_is_uniform_when_nothing_differs() -> None:
    """False alarms at level 0.05 in about 5 of 100 experiments, for a ratio of sums."""
    rng = np.random.default_rng(4)
    experiments = 400
    counts = rng.poisson(3, (2, experiments, 60)) + 1.0
    bad = rng.binomial(counts.astype(int), 0.3).astype(float)
    arms = np.stack([bad, counts], axis=-1)
    found = compare(["bad", "all"], arms[0], arms[1], ratio, resamples=10, swaps=999)["ratio"]
    alarms = np.mean([comparison.p_value <= 0.05 for comparison in found])
    assert 0.025 <= alarms <= 0.08


def test_a_minimum_detectable_difference_is_found_four_times_out_of_five() -> None:
    rng = np.random.default_rng(9)
    n, noise, experiments = 80, 0.2, 300
    detectable = minimum_detectable(noise / np.sqrt(n))
    treat = 0.5 - detectable + rng.normal(0, noise, (experiments, n))
    arms = [
        np.stack([a, np.ones_like(a)], axis=-1) for a in (np.full((experiments, n), 0.5), treat)
    ]
    found = compare(["right", "asked"], *arms, mean, resamples=10, swaps=999)["mean"]
    assert 0.73 <= np.mean([c.p_value <= 0.05 for c in found]) <= 0.87
    errors = [c.standard_error for c in compare(["right", "asked"], *arms, mean, swaps=1)["mean"]]
    assert np.mean(errors) == pytest.approx(noise / np.sqrt(n), rel=0.05)


def test_more_comparisons_need_larger_differences() -> None:
    assert minimum_detectable(1.0) == pytest.approx(2.80, abs=0.01)
    assert minimum_detectable(1.0, comparisons=33) > minimum_detectable(1.0, comparisons=2) > 2.8
