"""One interval by resampling: Efron's limits where samples tie, and what is said where they know no width."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.eval.statistics.bootstrap import bca_limits, interval

whole = st.integers(-3, 3)


def reference_bca(
    value: float, samples: list[int], without: list[int], confidence: float
) -> list[float]:
    """Efron's formulas (1987, sections 2 and 7), a sample that equals the value counting half on either side."""
    count = len(samples)
    below = sum(1.0 if s < value else 0.5 if s == value else 0.0 for s in samples) / count
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 0.5 / count), 1 - 0.5 / count))
    spread = [sum(without) / len(without) - one for one in without]
    cubes, squares = sum(d**3 for d in spread), sum(d**2 for d in spread)
    acceleration = cubes / 6 / squares**1.5 if len(set(without)) > 1 else 0.0
    limits = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        limits.append(float(np.quantile(samples, normal.cdf(bias + z / (1 - acceleration * z)))))
    return limits


@given(
    whole,
    st.lists(whole, min_size=1, max_size=30),
    st.lists(whole, min_size=1, max_size=8),
    st.sampled_from([0.8, 0.95]),
)
def test_limits_are_efrons_where_samples_tie(
    value: int, samples: list[int], without: list[int], confidence: float
) -> None:
    """Counts tie: resamples of right answers often have the value itself, and all may lie on one side of it."""
    found = bca_limits(value, np.array(samples, float), np.array(without, float), confidence)
    assert found == pytest.approx(reference_bca(value, samples, without, confidence), abs=1e-6)


@pytest.mark.parametrize(
    ("value", "floor", "expected"),
    [(0.5, 0.0, (0.2, 0.8)), (0.9, 0.0, (0.6, 1.0)), (1.0, 0.0, (0.7, 1.0)), (0.1, 0.0, (0.0, 0.4)),
     (-0.9, -1.0, (-1.0, -0.6)), (40.0, 0.0, (39.7, 40.3))],
)  # fmt: skip
def test_without_width_an_interval_has_room_up_to_where_the_metric_ends(
    value: float, floor: float, expected: tuple[float, float]
) -> None:
    """A share ends at 1; lengths and counts, which are above it, do not."""
    found = interval(value, np.full(9, value), np.full(9, value), 0.3, floor=floor)
    assert (found.low, found.high) == pytest.approx(expected)
