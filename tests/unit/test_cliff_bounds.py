"""Limits of a paired loss: exact cases, properties, and how often they err."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import beta, poisson

from vllm_flow.eval.cliff.bounds import (
    loss_limits,
    pictures_for,
    smallest_tolerance,
)

CHANGES = st.lists(st.sampled_from([-1.0, 0.0, 0.0, 1.0]), min_size=1, max_size=80)


@given(CHANGES, st.sampled_from([0.51, 0.8, 0.95, 0.99]))
@settings(deadline=None)
def test_limits_enclose_the_loss_and_widen_with_confidence(
    changes: list[float], confidence: float
) -> None:
    count = len(changes)
    found = loss_limits(np.array(changes) / count, 1 / count, count, confidence)
    assert found.value == pytest.approx(sum(changes) / count)
    assert found.low < found.value < found.high
    wider = loss_limits(np.array(changes) / count, 1 / count, count, confidence + 0.005)
    assert wider.low <= found.low and wider.high >= found.high


@given(CHANGES)
@settings(deadline=None)
def test_gain_is_loss_with_the_sign_changed(changes: list[float]) -> None:
    count = len(changes)
    one = loss_limits(np.array(changes) / count, 1 / count, count)
    other = loss_limits(-np.array(changes) / count, 1 / count, count)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


@given(CHANGES)
@settings(deadline=None)
def test_one_more_lost_answer_never_lowers_the_limit(changes: list[float]) -> None:
    count = len(changes) + 1
    unchanged = loss_limits(np.array([*changes, 0.0]) / count, 1 / count, count)
    lost = loss_limits(np.array([*changes, 1.0]) / count, 1 / count, count)
    assert lost.high > unchanged.high


@pytest.mark.parametrize("lost", [0, 1, 3, 10])
def test_without_gains_the_upper_limit_is_at_least_clopper_and_pearsons(lost: int) -> None:
    """The Poisson limit is the binomial one's upper neighbour, and close to it for small shares."""
    count = 2000
    found = loss_limits(np.full(lost, 1 / count), 1 / count, count, 0.95).high
    exact = beta.ppf(0.95, lost + 1, count - lost)
    assert exact <= found <= 1.01 * exact


@pytest.mark.parametrize("lost", [1, 3, 10])
def test_without_gains_the_lower_limit_joins_the_exact_one_and_what_may_be_gained(
    lost: int,
) -> None:
    """Exact: at it so many events or more come with the error rate. No gain was seen, and three may be missed."""
    count = 2000
    fewest = brentq(lambda mean: poisson.sf(lost - 1, mean) - 0.05, 0, lost)
    expected = lost - math.hypot(lost - fewest, -math.log(0.05))
    found = loss_limits(np.full(lost, 1 / count), 1 / count, count, 0.95)
    assert found.low == pytest.approx(expected / count)


@pytest.mark.parametrize("lost", [1, 2, 10])
@pytest.mark.parametrize("each", [1, 5])
def test_events_of_equal_weight_have_poissons_limits_times_it(lost: int, each: int) -> None:
    count = 1000
    most = brentq(lambda mean: poisson.cdf(lost, mean) - 0.05, lost, lost + 40)
    found = loss_limits(np.full(lost, each / count), 1 / count, count, 0.95)
    assert found.high == pytest.approx(each * most / count)


def test_an_event_that_was_not_seen_weighs_no_less_than_a_changed_answer() -> None:
    """However little the seen ones weigh; and as much as the largest of them."""
    tiny = loss_limits([1e-6], 0.01, 100, 0.95).high
    assert tiny == pytest.approx(-math.log(0.05) / 100, rel=1e-2) and tiny > smallest_tolerance(100)
    mixed = loss_limits([0.01, 0.03], 0.01, 100, 0.95).high
    assert mixed > loss_limits([0.02, 0.02], 0.01, 100, 0.95).high


def test_pictures_that_fail_as_a_whole_count_as_one_event() -> None:
    count = 1000
    single = loss_limits(np.full(10, 1 / count), 1 / count, count).high
    together = loss_limits(np.full(2, 5 / count), 1 / count, count).high
    assert together > 1.4 * single


@given(CHANGES, st.integers(1, 6))
@settings(deadline=None)
def test_pictures_may_have_been_missed_as_a_whole(changes: list[float], each: int) -> None:
    """However many questions there are about each of few pictures, harm and gain are no surer than by their number."""
    count = len(changes) * each
    few = loss_limits(np.array(changes) / len(changes), 1 / count, count, 0.95, len(changes))
    assert few.high - few.value >= smallest_tolerance(len(changes)) - sum(
        c > 0 for c in changes
    ) / len(changes)
    many = loss_limits(np.array(changes) / len(changes), 1 / count, count, 0.95)
    assert few.low <= many.low and few.high >= many.high
    unchanged = loss_limits([], 1 / count, count, 0.95, len(changes))
    assert unchanged.high == -unchanged.low == pytest.approx(smallest_tolerance(len(changes)))


@pytest.mark.parametrize(("pictures", "each"), [(301, 6), (151, 18)])
@pytest.mark.parametrize("within", [1.0, 0.3])
def test_pictures_that_fail_as_a_whole_pass_no_more_often_than_allowed(
    pictures: int, each: int, within: float
) -> None:
    """Just above the smallest tolerance that so many pictures can show, where a failure was hardly met: in a few
    pictures each answer is lost with a certain chance, in the others none."""
    tolerance = 1.001 * smallest_tolerance(pictures)
    rng = np.random.default_rng(3)
    touched = rng.binomial(pictures, tolerance / within, 1500)
    passed = 0
    for number in touched:
        lost = rng.binomial(each, within, number) / (pictures * each)
        found = loss_limits(lost, 1 / (pictures * each), pictures * each, 0.95, pictures)
        passed += found.high <= tolerance
    assert passed / 1500 <= 0.065, "at most 5 %, and what 1500 samples may add to it"


def test_smallest_tolerance_is_that_of_no_change_at_all() -> None:
    assert smallest_tolerance(600) == pytest.approx(-math.log(0.05) / 600)
    for tolerance in (0.005, 0.02, 0.1):
        needed = pictures_for(tolerance)
        assert smallest_tolerance(needed) <= tolerance < smallest_tolerance(needed - 1)


@pytest.mark.parametrize(
    ("items", "step", "confidence", "pictures", "says"),
    [
        (0, 0.1, 0.95, None, "needs questions"),
        (5, 0, 0.95, None, "a positive step"),
        (5, 0.2, 0.5, None, "between 0.5 and 1"),
        (5, 0.2, 1, None, "between 0.5 and 1"),
        (5, 0.2, 0.95, 0, "about 0 pictures"),
        (5, 0.2, 0.95, 6, "about 6 pictures"),
    ],
)
def test_nonsense_is_refused(
    items: int, step: float, confidence: float, pictures: int | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        loss_limits([], step, items, confidence, pictures)


@pytest.mark.parametrize("gained", [0.0, 0.003, 0.02])
@pytest.mark.parametrize("expected", [3.2, 10, 40])
def test_a_loss_at_the_tolerance_passes_no_more_often_than_allowed(
    gained: float, expected: float
) -> None:
    """Single-test error rate on the boundary, where it is largest: 8000 simulated samples."""
    tolerance = 0.01
    count = int(expected / tolerance)
    rng = np.random.default_rng(7)
    drawn = rng.multinomial(count, [tolerance + gained, gained, 1 - tolerance - 2 * gained], 8000)
    passed = 0
    for (lost, won), times in Counter(map(tuple, drawn[:, :2].tolist())).items():
        changes = np.concatenate([np.full(lost, 1.0), np.full(won, -1.0)]) / count
        passed += times * (loss_limits(changes, 1 / count, count).high <= tolerance)
    # Square-and-add is not exact: allow what it was seen to exceed by, and simulation noise.
    assert passed / 8000 <= 0.06
