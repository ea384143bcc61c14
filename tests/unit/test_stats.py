"""Statistics: against statsmodels, against simulation, and their symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from vllm_flow.eval.statistics.intervals import (
    accuracy,
    mcnemar_p,
    newcombe_interval,
    paired_difference,
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
