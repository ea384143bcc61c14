"""How many questions a tolerance needs: against simulated sweeps read by the report's own intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from vllm_flow.eval.statistics.bootstrap import compare
from vllm_flow.eval.statistics.intervals import accuracy, clustered_share, newcombe_interval
from vllm_flow.eval.statistics.power import (
    design_effect,
    forecast,
    questions_needed,
    tolerance_shown,
)


@pytest.mark.parametrize("tolerance", [0.02, 0.05])
@pytest.mark.parametrize("changed", [0.02, 0.1])
def test_so_many_questions_show_it_four_times_out_of_five(tolerance: float, changed: float) -> None:
    """Of sweeps in which nothing is lost, read by Newcombe's interval as the report does."""
    number = questions_needed(tolerance, changed)
    rng = np.random.default_rng(0)
    sweeps = 200
    cells = rng.multinomial(
        number, [0.7 - changed / 2, changed / 2, changed / 2, 0.3 - changed / 2], sweeps
    )
    shown = sum(
        -newcombe_interval(int(both), int(gained), int(lost), int(neither)).low <= tolerance
        for both, gained, lost, neither in cells
    )
    assert 0.72 <= shown / sweeps <= 0.93
    # With a third of the questions it comes out much less often.
    few = rng.multinomial(
        number // 3, [0.7 - changed / 2, changed / 2, changed / 2, 0.3 - changed / 2], sweeps
    )
    rarely = sum(-newcombe_interval(*map(int, row)).low <= tolerance for row in few)
    assert rarely < shown - 0.2 * sweeps


def test_questions_that_change_together_need_the_design_effect() -> None:
    """Five questions a picture, of which all or none change: read by the report's bootstrap of pictures."""
    tolerance, changed, each = 0.05, 0.05, 5
    pictures = [str(i) for i in range(100) for _ in range(each)]
    assert design_effect(pictures) == each
    number = questions_needed(tolerance, changed, design=design_effect(pictures)) // each
    rng = np.random.default_rng(1)
    right = np.full(number, 0.7 * each)
    moved = rng.choice(
        [-each, 0, each], p=[changed / 2, 1 - changed, changed / 2], size=(120, number)
    )
    baseline = np.stack([np.broadcast_to(right, moved.shape), np.full(moved.shape, each)], axis=2)
    treated = baseline.copy()
    treated[:, :, 0] += moved
    found = compare(
        ["right", "asked"], baseline, treated, lambda t: {"accuracy": t["right"] / t["asked"]},
        resamples=400, swaps=1,
    )["accuracy"]  # fmt: skip
    shown = np.mean([-one.difference.low <= tolerance for one in found])
    assert 0.68 <= shown <= 0.93
    alone = questions_needed(tolerance, changed) // each
    assert alone * 4 < number


def test_what_is_shown_is_the_formulas() -> None:
    """Of a thousand questions a hundred change: z of the limit times sqrt(101), z of the power times sqrt(100)."""
    even = tolerance_shown(1000, 0.1, power=0.5)
    assert even == pytest.approx(1.959964 * np.sqrt(101) / 1000, rel=1e-6)
    wide = tolerance_shown(1000, 0.1, confidence=0.9, power=0.5)
    assert wide == pytest.approx(1.644854 * np.sqrt(101) / 1000, rel=1e-6)
    surer = tolerance_shown(1000, 0.1, power=0.8)
    assert surer - even == pytest.approx(0.841621 * 10 / 1000, rel=1e-5)


@given(st.floats(0.001, 0.5), st.floats(0, 1), st.floats(1, 30))
def test_the_two_are_inverse(tolerance: float, changed: float, design: float) -> None:
    number = questions_needed(tolerance, changed, design=design)
    assert tolerance_shown(number / design, changed) <= tolerance * (1 + 1e-9)
    if number > 1:
        assert tolerance_shown((number - 1) / design, changed) > tolerance


@given(st.floats(0.001, 0.5), st.floats(0, 0.5))
def test_less_is_never_asked_for_more(tolerance: float, changed: float) -> None:
    number = questions_needed(tolerance, changed)
    assert questions_needed(tolerance / 2, changed) >= number
    assert questions_needed(tolerance, min(changed * 2, 1)) >= number
    assert questions_needed(tolerance, changed, power=0.9) >= number
    assert number >= questions_needed(tolerance, 0) > 1 / tolerance


def test_design_effects() -> None:
    assert design_effect("abcd") == 1
    assert design_effect("aabb") == 2
    assert design_effect("aaab") == pytest.approx((9 + 1) / 4)
    assert design_effect("aabb", 0.0) == 1 and design_effect("aabb", 0.5) == 1.5
    for wrong in ((0.0, 0.1), (1.5, 0.1), (0.01, -0.1), (0.01, 2)):
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            questions_needed(*wrong)
    for chance in ({"confidence": 0.0}, {"confidence": 1.0}, {"power": 0.49}, {"power": 1.0}):
        with pytest.raises(ValueError, match="no confidence or power"):
            tolerance_shown(100, 0.1, **chance)
    with pytest.raises(ValueError, match="needs questions"):
        design_effect([])
    with pytest.raises(ValueError, match="needs questions"):
        tolerance_shown(0, 0.1)


def test_the_sentence() -> None:
    text = forecast([str(i // 2) for i in range(40)], 0.01)
    assert "40 questions on 20 pictures" in text and "picture's together" in text
    assert f"1 point would take {questions_needed(0.01, 0.02)} to" in text
    assert str(questions_needed(0.01, 0.1, design=2)) in text
    alone = forecast(["a", "b"], 0.02)
    assert "together" not in alone and "2 points would take" in alone


def test_a_share_of_clustered_answers() -> None:
    """Worth less where a picture's answers go together; Wilson's own where they do not."""
    single = clustered_share([1.0] * 30 + [0.0] * 10, list(range(40)))
    wilson = accuracy(30, 40)
    assert (single.low, single.high) == (pytest.approx(wilson.low), pytest.approx(wilson.high))
    pairs = clustered_share([1.0] * 30 + [0.0] * 10, [i // 2 for i in range(40)])
    # Twice the variance of independent answers (both with their n - 1), told by 20 pictures and not 40 answers.
    worth = 40 * 19 / 39 * (student.ppf(0.975, 39) / student.ppf(0.975, 19)) ** 2
    low, high = proportion_confint(0.75 * worth, worth, method="wilson")
    assert (pairs.low, pairs.high) == (pytest.approx(low), pytest.approx(high))
    one = clustered_share([1.0] * 30 + [0.0] * 10, [0] * 40)
    low, high = proportion_confint(0.75, 1, method="wilson")
    assert (one.low, one.high) == (pytest.approx(low), pytest.approx(high)), (
        "one picture tells little"
    )
    same = clustered_share([1.0] * 40, [i // 4 for i in range(40)])
    assert same.low == pytest.approx(accuracy(10, 10).low) and same.high == 1.0
    with pytest.raises(ValueError, match="a unit for each"):
        clustered_share([1.0], [])


@pytest.mark.parametrize("pictures", [8, 60])
def test_clustered_shares_cover_the_truth(pictures: int) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(800):
        rates = rng.beta(1, 0.5, pictures)  # a picture's difficulty; 2/3 on average
        answers = (rng.random((pictures, 6)) < rates[:, None]).astype(float)
        found = clustered_share(list(answers.ravel()), [i // 6 for i in range(6 * pictures)])
        covered += found.low <= 2 / 3 <= found.high
    assert 0.93 <= covered / 800 <= 0.98


def test_a_share_takes_a_row_of_an_array() -> None:
    """As the finder without labels hands them over; an array has no truth value."""
    row = np.array([1.0, 0.0, 1.0])
    assert clustered_share(row, [0, 0, 1]) == clustered_share([1.0, 0.0, 1.0], [0, 0, 1])
