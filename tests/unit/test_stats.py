"""Statistics: against statsmodels, against simulation, and their symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from vllm_flow.eval.statistics.intervals import (
    Interval,
    accuracy,
    between,
    holm,
    mcnemar_p,
    median,
    newcombe_interval,
    paired_difference,
    unseen_share,
)

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)
counts = st.integers(0, 150)


@given(st.integers(1, 2000), st.data())
def test_accuracy_is_statsmodels_wilson(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    ours = accuracy(correct, total)
    low, high = proportion_confint(correct, total, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


@pytest.mark.parametrize("correct, total", [(0, 0), (-1, 5), (6, 5)])
def test_accuracy_refuses_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{correct}/{total}"):
        accuracy(correct, total)


@given(counts, counts)
def test_mcnemar_is_statsmodels_exact(gained: int, lost: int) -> None:
    expected = mcnemar([[3, lost], [gained, 4]], exact=True).pvalue if gained + lost else 1.0
    assert mcnemar_p(gained, lost) == pytest.approx(expected, abs=1e-12)


@given(answers)
def test_paired_difference_counts_pairs(pairs: list[tuple[bool, bool]]) -> None:
    baseline, treatment = [b for b, _ in pairs], [t for _, t in pairs]
    result = paired_difference(baseline, treatment)
    assert result.difference.value == pytest.approx(np.mean(treatment) - np.mean(baseline))
    assert (result.gained - result.lost) / len(pairs) == pytest.approx(result.difference.value)
    assert -1 <= result.difference.low <= result.difference.value <= result.difference.high <= 1
    assert 0 <= result.p_value <= 1


@given(answers)
def test_swapping_the_sides_mirrors_the_interval(pairs: list[tuple[bool, bool]]) -> None:
    baseline, treatment = [b for b, _ in pairs], [t for _, t in pairs]
    there, back = paired_difference(baseline, treatment), paired_difference(treatment, baseline)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.difference.low == pytest.approx(-back.difference.high)
    assert there.difference.high == pytest.approx(-back.difference.low)


def test_identical_answers_differ_by_nothing() -> None:
    same = [True] * 90 + [False] * 10
    result = paired_difference(same, same)
    assert (result.difference.value, result.p_value) == (0, 1)
    assert result.difference.low <= 0 <= result.difference.high


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([True, False], [True])


@pytest.mark.parametrize(
    "table, low, high",
    [
        # The data of Bentur et al. (2009), an example in Fagerland, Lydersen and Laake (2014).
        ((1, 1, 7, 12), -0.507, -0.026),
        # An example in Altman et al., Statistics with Confidence (2000).
        ((14, 5, 0, 22), 0.011, 0.226),
    ],
)
def test_newcombe_interval_of_two_textbook_tables(
    table: tuple[int, int, int, int], low: float, high: float
) -> None:
    """Limits remembered from the books, not looked up; the coverage test below is the evidence."""
    ours = newcombe_interval(*table)
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize(
    "cells", [(0.90, 0.02, 0.05, 0.03), (0.5, 0.02, 0.3, 0.18), (0.45, 0.2, 0.2, 0.15)]
)
def test_newcombe_interval_covers_the_truth(cells: tuple[float, ...]) -> None:
    """95 % intervals hold the true difference in about 95 of 100 simulated experiments."""
    truth = cells[1] - cells[2]
    drawn = np.random.default_rng(0).multinomial(120, cells, size=1000)
    tables, times = np.unique(drawn, axis=0, return_counts=True)
    intervals = [newcombe_interval(*(int(n) for n in table)) for table in tables]
    covered = np.average(
        [i.low - 1e-12 <= truth <= i.high + 1e-12 for i in intervals], weights=times
    )
    assert 0.93 <= covered <= 0.985


different = st.lists(st.integers(-1000, 1000), min_size=1, max_size=60, unique=True)


@given(different, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_medians_interval_is_what_the_sign_test_does_not_reject(
    values: list[int], confidence: float
) -> None:
    """Between two values nothing but how many lie below counts; an interval without an end is none."""
    places = [value - 0.5 for value in sorted(values)] + [max(values) + 0.5]
    held = [
        place
        for below, place in enumerate(places)
        if binomtest(below, len(values)).pvalue > 1 - confidence
    ]
    ours = median(values, confidence)
    if places[0] in held:
        assert ours is None
    else:
        assert ours is not None
        assert ours.value == pytest.approx(np.median(values))
        assert (ours.low, ours.high) == (places[places.index(held[0]) - 1] + 0.5, held[-1] + 0.5)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_the_medians_interval_needs_six_values_and_no_order(values: list[float]) -> None:
    """Mirrored values have the mirrored interval, equal ones among them too."""
    ours, mirrored = median(values), median([-value for value in reversed(values)])
    assert (ours is None) == (mirrored is None) == (len(values) < 6)
    if ours is not None and mirrored is not None:
        assert (ours.value, ours.low, ours.high) == (
            pytest.approx(-mirrored.value),
            -mirrored.high,
            -mirrored.low,
        )
        assert ours.low <= ours.value <= ours.high


@pytest.mark.parametrize(
    "number, draw, truth",
    [
        (6, "standard_exponential", np.log(2)),
        (9, "standard_cauchy", 0.0),
        (15, "standard_exponential", np.log(2)),
        (80, "standard_cauchy", 0.0),
    ],
)
def test_the_medians_interval_covers_the_truth(number: int, draw: str, truth: float) -> None:
    """In at least 95 of 100 samples, from a skewed distribution and from one without a mean."""
    samples = getattr(np.random.default_rng(number), draw)((600, number))
    found = [median(sample) for sample in samples]
    covered = sum(i is not None and i.low <= truth <= i.high for i in found)
    assert binomtest(int(covered), 600, 0.95, alternative="less").pvalue > 0.01
    assert covered < 0.99 * 600  # nor is it wider than ranks must make it


def test_a_median_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        median([])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(deadline=None, max_examples=8)
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    expected = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(expected.tolist(), abs=1e-12)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_only_raises_and_keeps_order(p_values: list[float]) -> None:
    ours = holm(p_values)
    assert all(p <= a <= 1 for a, p in zip(ours, p_values, strict=True))
    ranked = [a for _, a in sorted(zip(p_values, ours, strict=True))]
    assert ranked == sorted(ranked)


@given(st.integers(1, 5000))
def test_unseen_share_is_clopper_pearsons_limit(trials: int) -> None:
    assert unseen_share(trials) == pytest.approx(
        proportion_confint(0, trials, method="beta")[1], rel=1e-6
    )


def test_no_trials_show_nothing() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        unseen_share(0)


def test_an_interval_over_seeds_holds_their_mean() -> None:
    """As often as it says, for draws that are normal; and no draws, or one, tell nothing of others."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        found = between(list(rng.normal(0.6, 0.03, 3)), 0.9)
        assert found is not None
        held += found.low <= 0.6 <= found.high
    assert 0.88 < held / 2000 < 0.92
    assert between([]) is between([0.5]) is None
    assert between([0.25, 0.25]) == Interval(0.25, 0.25, 0.25)
