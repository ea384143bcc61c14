"""Numbers of a heat map, and the exact statistics of a pointing game."""

from __future__ import annotations

from itertools import product
from math import isnan, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom

from vllm_flow.analysis.exact import clopper_pearson, mcnemar_greater, poisson_binomial_tail
from vllm_flow.analysis.maps import (
    count_hits,
    entropy,
    mass_inside,
    normalised,
    pointing_chance,
    points_inside,
)

heats = arrays(np.float64, (4, 4), elements=st.floats(0, 1e3).map(lambda x: x if x > 1e-6 else 0.0))
shares = arrays(np.float64, (4, 4), elements=st.floats(0, 1))


@settings(deadline=None)
@given(heats)
def test_normalised_peaks_at_one_and_keeps_ratios(heat: np.ndarray) -> None:
    found = normalised(heat)
    assert found.max() == (1 if heat.any() else 0)
    np.testing.assert_allclose(found * heat.max(), heat)


@settings(deadline=None)
@given(heats, st.floats(0.1, 100))
def test_entropy_is_between_one_patch_and_all(heat: np.ndarray, factor: float) -> None:
    value = entropy(heat)
    if not heat.any():
        assert isnan(value)
        return
    assert -1e-9 <= value <= 1 + 1e-9
    assert value == pytest.approx(entropy(heat * factor), abs=1e-9)


def test_entropy_by_hand() -> None:
    one, two = np.zeros((4, 4)), np.zeros((4, 4))
    one[1, 1], two[0, 0], two[3, 3] = 5, 2, 2
    assert entropy(one) == 0 and entropy(two) == pytest.approx(0.25)  # ln 2 / ln 16
    assert entropy(np.ones((4, 4))) == pytest.approx(1)


@settings(deadline=None)
@given(heats, shares)
def test_mass_in_a_box_and_outside_is_all(heat: np.ndarray, coverage: np.ndarray) -> None:
    inside, outside = mass_inside(heat, coverage), mass_inside(heat, 1 - coverage)
    assert (isnan(inside) and isnan(outside)) or inside + outside == pytest.approx(1)
    assert mass_inside(np.ones((4, 4)), coverage) == pytest.approx(coverage.mean())


def test_pointing() -> None:
    coverage = np.zeros((4, 4))
    coverage[0, :2] = 1, 0.4
    heat = np.zeros((4, 4))
    assert not points_inside(heat, np.ones((4, 4)))  # no heat points nowhere
    heat[0, 0] = 1
    assert points_inside(heat, coverage)
    heat[0, 1] = 2
    assert not points_inside(heat, coverage)  # less than half of that patch is covered
    assert pointing_chance(coverage) == 1 / 16


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 6))
def test_tail_of_unequal_coins_by_enumeration(chances: list[float], least: int) -> None:
    total = sum(
        prod(p if hit else 1 - p for p, hit in zip(chances, hits, strict=True))
        for hits in product((0, 1), repeat=len(chances))
        if sum(hits) >= least
    )
    assert poisson_binomial_tail(chances, least) == pytest.approx(total, abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_interval_has_exact_tails(total: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, total))
    low, high = clopper_pearson(hits, total)
    assert low <= hits / total <= high
    if hits:
        assert binom.sf(hits - 1, total, low) == pytest.approx(0.025, rel=1e-6)
    if hits < total:
        assert binom.cdf(hits, total, high) == pytest.approx(0.025, rel=1e-6)


def test_equal_coins_are_binomial() -> None:
    found = count_hits([True] * 7 + [False] * 13, [0.2] * 20)
    assert (found.hits, found.total, found.share) == (7, 20, 0.35)
    assert found.p_value == pytest.approx(binom.sf(6, 20, 0.2))
    assert mcnemar_greater(5, 0) == pytest.approx(1 / 32) and mcnemar_greater(0, 0) == 1
