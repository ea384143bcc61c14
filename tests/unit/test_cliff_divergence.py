"""Divergence of next-token distributions, means over questions, and the rule that makes a layer of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr

from vllm_flow.eval.cliff.divergence import (
    Mean,
    bootstrap_means,
    divergence,
    divergence_cliff,
    stays_below,
)

LOGITS = st.lists(st.floats(-20, 20), min_size=7, max_size=7).map(np.array)


@given(LOGITS, LOGITS)
@settings(deadline=None)
def test_divergence_is_scipys(p: np.ndarray, q: np.ndarray) -> None:
    expected = rel_entr(np.exp(log_softmax(p)), np.exp(log_softmax(q))).sum()
    # Unnormalised as well: a constant added to all logits changes nothing.
    assert divergence(log_softmax(p), q + 3) == pytest.approx(expected, abs=1e-9)
    assert divergence(p, p) == pytest.approx(0, abs=1e-12)


def test_tokens_without_probability() -> None:
    with_one, with_both = np.array([0.0, -np.inf]), np.log([0.5, 0.5])
    assert divergence(with_one, with_both) == pytest.approx(np.log(2))
    assert divergence(with_both, with_one) == np.inf
    assert divergence(with_one, with_one) == 0


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0, 1))
@settings(deadline=None)
def test_stays_below_looks_at_every_later_layer(values: list[float], threshold: float) -> None:
    layer = stays_below(values, threshold, len(values))
    assert all(value <= threshold for value in values[layer:])
    assert layer == 0 or values[layer - 1] > threshold


def test_bootstrap_intervals_cover_the_mean() -> None:
    rng = np.random.default_rng(5)
    values = rng.exponential(1.0, (300, 40))
    means = bootstrap_means(values, 0.9)
    assert [m.value for m in means] == pytest.approx(values.mean(axis=1))
    covered = np.mean([m.low <= 1.0 <= m.high for m in means])
    assert 0.8 <= covered <= 0.96
    assert bootstrap_means(np.ones((1, 9))) == [Mean(1, 1, 1)]
    assert means == bootstrap_means(values, 0.9)


def test_pictures_are_resampled_with_all_of_their_questions() -> None:
    """The same twice is no more evidence; and the mean is over questions, of however many a picture has."""
    values = np.random.default_rng(3).exponential(1, (2, 30))
    alone = bootstrap_means(values, resamples=200)
    units = np.repeat(np.arange(30), 2)
    twice = bootstrap_means(np.repeat(values, 2, axis=1), resamples=200, units=units.tolist())
    for one, other in zip(alone, twice, strict=True):
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high))
    (uneven,) = bootstrap_means([[1.0, 1.0, 4.0]], resamples=200, units=[0, 0, 1])
    assert (uneven.value, uneven.low, uneven.high) == (2.0, 1.0, 4.0)


def test_the_upper_limit_is_the_more_cautious_reading() -> None:
    means = [
        Mean(1, 0.5, 2),
        Mean(0.01, 0, 0.2),
        Mean(0.3, 0.1, 0.5),
        Mean(0.05, 0, 0.2),
        Mean(0, 0, 0.01),
    ]
    assert divergence_cliff(means, 0.1, "mean") == 3
    assert divergence_cliff(means, 0.1, "upper") == 4
    assert divergence_cliff(means, 0.001, "upper") == 5
