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
    assert (uneven.value, uneven.low, uneven.high) == (2.0, 1.0, 4.0), (
        "two pictures make no interval"
    )


@pytest.mark.parametrize(("pictures", "most"), [(10, 0.13), (32, 0.09)])
def test_limits_of_skewed_divergences_are_rarely_too_low(pictures: int, most: float) -> None:
    """Two questions on each picture, most of which hardly move and some far. Percentiles miss in 12 % of samples of
    32 pictures, in 19 % of 10; 2.5 % are meant, and what is left is what so few cannot know."""
    rng = np.random.default_rng(1)
    moved = np.repeat(rng.lognormal(0, 1.0, (500, pictures)), 2, axis=1)
    units = np.repeat(np.arange(pictures), 2).tolist()
    means = bootstrap_means(moved, resamples=1000, units=units)
    truth = np.exp(0.5)
    assert np.mean([one.high < truth for one in means]) <= most
    assert np.mean([one.low > truth for one in means]) <= 0.04
    assert all(0 <= one.low <= one.value <= one.high for one in means)


def test_limits_are_the_bootstrap_ts() -> None:
    """Of pictures with one to three questions, resampled one by one with the same draws."""
    rng = np.random.default_rng(2)
    units = rng.integers(0, 12, 30)
    units[:12] = np.arange(12)
    values = rng.exponential(1, 30)

    def mean_and_error(chosen: np.ndarray) -> tuple[float, float]:
        sums = np.array([values[units == unit].sum() for unit in chosen])
        sizes = np.array([np.sum(units == unit) for unit in chosen])
        mean = sums.sum() / sizes.sum()
        return mean, np.sqrt(np.sum((sums - mean * sizes) ** 2)) / sizes.sum()

    mean, error = mean_and_error(np.arange(12))
    assert mean == pytest.approx(values.mean())
    moved = []
    for times in np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), 300):
        drawn, own = mean_and_error(np.repeat(np.arange(12), times))
        moved.append((drawn - mean) / own)
    high, low = np.quantile(moved, [0.05, 0.95])
    (found,) = bootstrap_means([values], 0.9, resamples=300, seed=7, units=units.tolist())
    assert found.value == pytest.approx(mean)
    assert found.high == pytest.approx(mean - high * error)
    assert found.low == pytest.approx(max(mean - low * error, 0))


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_limits_scale_with_the_values(scale: float) -> None:
    """Divergences of deep layers are tiny, and no rounding for that; values that are all the same have no width."""
    values = np.random.default_rng(4).exponential(1, (3, 12))
    for one, other in zip(bootstrap_means(values), bootstrap_means(scale * values), strict=True):
        assert (other.value, other.low, other.high) == pytest.approx(
            (scale * one.value, scale * one.low, scale * one.high)
        )
    (same,) = bootstrap_means(np.full((1, 12), scale * 0.1))
    assert (same.low, same.high) == pytest.approx((scale * 0.1, scale * 0.1))


def test_what_no_divergence_bounds_is_infinite() -> None:
    means = bootstrap_means([[0.1, np.inf, 0.2], [0.1, 0.3, 0.2], [0.0, 0.0, 0.0]])
    assert means[0] == Mean(np.inf, 0.0, np.inf) and means[2] == Mean(0, 0, 0)
    assert means[1] == bootstrap_means([[0.1, 0.3, 0.2]])[0]
    assert divergence_cliff(means, 1e9, "upper") == 1
    five = bootstrap_means([[0.1, np.inf, 0.2, 0.3, 0.4], [0.1, 0.3, 0.2, 0.3, 0.4]])
    (alone,) = bootstrap_means([[0.1, 0.3, 0.2, 0.3, 0.4]])
    assert five[0] == means[0] and (five[1].low, five[1].high) == pytest.approx(
        (alone.low, alone.high)
    )


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
