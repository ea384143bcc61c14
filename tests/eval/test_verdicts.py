"""What intervals and p values say in words, and which cliff they show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.eval.statistics.verdicts import CliffEvidence, find_cliff, judge, loss_of


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high)


@pytest.mark.parametrize(
    "difference, p, higher, finding, within",
    [
        (interval(-0.06, -0.02), 0.001, True, "worse", False),
        (interval(-0.06, -0.02), 0.001, False, "better", False),
        (interval(0.02, 0.06), 0.001, True, "better", False),
        (interval(0.02, 0.06), 0.001, False, "worse", False),
        (interval(0.0, 0.04), 0.2, True, "none", False),
        (interval(-0.009, -0.001), 0.01, True, "worse", True),
        (interval(-0.04, 0.01), 0.2, True, "none", False),
        (interval(-0.008, 0.009), 0.9, True, "none", True),
    ],
)
def test_verdicts(difference: Interval, p: float, higher: bool, finding: str, within: bool) -> None:
    verdict = judge(difference, p, identical=False, higher_is_better=higher, tolerance=0.01)
    assert (verdict.finding, verdict.within_tolerance) == (finding, within)


@pytest.mark.parametrize("unseen", [0.0, 0.01, 0.011])
def test_what_is_just_within_the_tolerance_is_within(unseen: float) -> None:
    """Limits and what may not have been seen alike; beyond it is what is larger."""
    verdict = judge(
        interval(-0.01, 0.01), 0.001, identical=False, higher_is_better=True, tolerance=0.01, unseen=unseen
    )  # fmt: skip
    assert verdict.within_tolerance == (unseen <= 0.01)
    assert verdict.finding == "none", "no difference is neither worse nor better, whatever p is"
    at = [CliffEvidence(4, Interval(0.01, 0.0, 0.01), 0.001, unseen)]
    cliff = find_cliff(at, tolerance=0.01)
    assert (cliff.found, cliff.seen) == (4, 4)
    assert cliff.shown == (4 if unseen <= 0.01 else None)


@given(st.floats(-0.1, 0.1), st.floats(0, 0.1), st.floats(0, 1), st.booleans())
def test_answers_that_scored_the_same_are_called_so(
    value: float, half: float, p: float, higher: bool
) -> None:
    """Whatever p is; how wide the interval is decides on the tolerance all the same."""
    wide = Interval(value, value - half, value + half)
    found = judge(wide, p, identical=True, higher_is_better=higher, tolerance=0.05)
    assert found.finding == "identical"
    assert found.within_tolerance == (max(abs(wide.low), abs(wide.high)) <= 0.05)


def test_what_loses_all_is_worse() -> None:
    lost = judge(interval(-1, -1), 0.001, identical=False, higher_is_better=True, tolerance=0.01)
    assert lost.finding == "worse"


@pytest.mark.parametrize(("p", "found"), [(0.05, 4), (0.0499, None)])
def test_a_finding_is_below_the_level(p: float, found: int | None) -> None:
    assert find_cliff(evidence((4, 0.2, 0.1, p)), tolerance=0.01).found == found
    verdict = judge(interval(-0.3, -0.1), p, identical=False, higher_is_better=True, tolerance=0.01)
    assert verdict.finding == ("none" if found else "worse")


def evidence(*rows: tuple[int, float, float, float]) -> list[CliffEvidence]:
    """(cliff, loss, half width, corrected p)."""
    return [CliffEvidence(c, Interval(x, x - h, x + h), p) for c, x, h, p in rows]


def test_found_cliff_of_a_clean_curve() -> None:
    rows = evidence(
        (0, 0.4, 0.05, 0.0), (8, 0.03, 0.01, 0.001), (12, 0.005, 0.015, 0.6),
        (16, 0.0, 0.005, 1.0), (20, 0.002, 0.005, 1.0),
    )  # fmt: skip
    cliff = find_cliff(rows, tolerance=0.01)
    assert (cliff.found, cliff.shown, cliff.asked) == (12, 16, (0, 8, 12, 16, 20))
    assert cliff.seen == 12 and not cliff.too_few


def test_few_questions_show_nothing_and_see_what_they_do_not_find() -> None:
    """30 points lost at cliff 6, and no test that finds it: no cliff is shown, and none marked there."""
    rows = evidence((6, 0.3, 0.35, 0.2), (12, 0.0, 0.2, 1.0), (18, -0.02, 0.2, 1.0))
    cliff = find_cliff(rows, tolerance=0.01)
    assert (cliff.found, cliff.seen, cliff.shown, cliff.too_few) == (6, 12, None, True)
    lucky = [CliffEvidence(12, Interval(-0.07, -0.1, -0.02), 1.0, 0.26)]
    assert find_cliff(lucky, tolerance=0.01).shown is None, (
        "12 pictures, one gained: a loss may be unseen"
    )
    assert find_cliff(lucky, tolerance=0.3).shown == 12
    sure = find_cliff(evidence((6, 0.3, 0.1, 0.0), (12, 0.2, 0.1, 0.0)), tolerance=0.01)
    assert (sure.seen, sure.shown, sure.too_few) == (None, None, False)


def test_a_dip_further_down_spoils_what_is_above_it() -> None:
    rows = evidence((8, 0.0, 0.005, 1.0), (12, 0.05, 0.01, 0.001), (16, 0.0, 0.005, 1.0))
    cliff = find_cliff(rows, tolerance=0.01)
    assert (cliff.found, cliff.shown) == (16, 16)


def test_a_loss_at_the_deepest_cliff_leaves_nothing_found() -> None:
    cliff = find_cliff(evidence((8, 0.0, 0.001, 1.0), (28, 0.05, 0.01, 0.001)), tolerance=0.01)
    assert (cliff.found, cliff.shown) == (None, None)


def test_a_sure_loss_within_the_tolerance_is_put_up_with() -> None:
    rows = evidence((8, 0.006, 0.003, 0.001))
    assert find_cliff(rows, tolerance=0.01).found == 8
    assert find_cliff(rows, tolerance=0.005).found is None


losses = st.tuples(st.integers(0, 30), st.floats(-0.2, 0.5), st.floats(0.001, 0.1), st.floats(0, 1))


@given(st.lists(losses, min_size=1, max_size=12, unique_by=lambda row: row[0]))
def test_found_cliffs_keep_their_promise(rows: list[tuple[int, float, float, float]]) -> None:
    found = evidence(*rows)
    cliff = find_cliff(found, tolerance=0.01)
    for one in found:
        lost = one.p_corrected < 0.05 and one.loss.value > 0.01
        if cliff.found is not None and one.cliff >= cliff.found:
            assert not lost
        if cliff.shown is not None and one.cliff >= cliff.shown:
            assert one.loss.high <= 0.01
        if cliff.seen is not None and one.cliff >= cliff.seen:
            assert one.loss.value <= 0.01
    order = [31 if at is None else at for at in (cliff.found, cliff.seen, cliff.shown)]
    assert order == sorted(order), "found, then seen, then shown"
    # Smallest: the next shallower cliff asked breaks the promise.
    below = [one for one in found if cliff.found is None or one.cliff < cliff.found]
    if below:
        next_one = max(below, key=lambda one: one.cliff)
        assert next_one.p_corrected < 0.05 and next_one.loss.value > 0.01


@given(st.floats(-1, 1), st.floats(0, 0.5))
def test_a_loss_points_the_other_way(value: float, half: float) -> None:
    difference = Interval(value, value - half, value + half)
    loss = loss_of(difference, higher_is_better=True)
    assert (loss.value, loss.low, loss.high) == (-value, -difference.high, -difference.low)
    assert loss_of(difference, higher_is_better=False) == difference
