"""Where a task levels off, with its interval, and what is said about the tasks' order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.demo_model.training.answers import Counts
from vllm_flow.demo_model.training.card_figures import checks_of
from vllm_flow.demo_model.training.levels import (
    SHARE,
    Level,
    bootstrap_levels,
    level_off,
    order_text,
)

CLIFFS = (0, 2, 4, 6, 8)
shares = st.lists(st.floats(0, 1), min_size=5, max_size=5)


@given(shares)
def test_from_the_level_on_the_share_stays(values: list[float]) -> None:
    curve = np.array(values)
    level = int(level_off(curve, CLIFFS))
    at = CLIFFS.index(level)
    worth = curve[-1] - curve[0]
    if abs(worth) <= 1e-12:
        assert level == CLIFFS[-1]
        return
    share = (curve - curve[0]) / worth
    assert all(share[at:-1] >= SHARE)
    if at:
        assert share[at - 1] < SHARE, "a shallower layer would do"


@given(shares, st.floats(0.1, 5), st.floats(-3, 3))
def test_scale_shift_and_direction_do_not_matter(
    values: list[float], scale: float, shift: float
) -> None:
    curve = np.round(np.array(values), 2)  # far from the edge at which rounding decides
    share = (curve - curve[0]) / ((curve[-1] - curve[0]) or 1)
    if np.any(np.abs(share - SHARE) < 1e-6):
        return
    for sign in (1, -1):
        assert level_off(sign * scale * curve + shift, CLIFFS) == level_off(curve, CLIFFS)


def counts_of_units(right: np.ndarray) -> Counts:
    """[C, U] right answers, one question per picture."""
    values = np.stack([right, np.ones_like(right)], axis=-1).astype(float)
    return Counts(("right", "asked"), values, right.shape[1])


def accuracy(parts):
    return {"accuracy": parts["right"] / parts["asked"]}


def test_bootstrap_finds_a_sharp_cliff_and_doubts_a_soft_one() -> None:
    rng = np.random.default_rng(0)
    full = rng.random(300) < 0.95
    sharp = np.stack([np.zeros(300), np.zeros(300), full, full, full]).astype(bool)
    layer, draws = bootstrap_levels(counts_of_units(sharp), accuracy, "accuracy", CLIFFS, 200)
    assert layer == 4 and set(draws.tolist()) == {4}
    late = full & (rng.random(300) < 0.95)
    soft = np.stack([np.zeros(300), np.zeros(300), late, full, full]).astype(bool)
    layer, draws = bootstrap_levels(counts_of_units(soft), accuracy, "accuracy", CLIFFS, 200)
    assert layer in (4, 6) and set(draws.tolist()) == {4, 6}


def test_resamples_are_of_pictures() -> None:
    """Two pictures of a hundred questions each disagree: now and then one is drawn alone."""
    values = np.zeros((5, 2, 2))
    values[..., 1] = 100
    values[1:, 0, 0] = 100
    values[3:, 1, 0] = 100
    counts = Counts(("right", "asked"), values, 200)
    layer, draws = bootstrap_levels(counts, accuracy, "accuracy", CLIFFS, 400)
    assert layer == 6
    assert 0.15 < (draws == 2).mean() < 0.35 and set(draws.tolist()) == {2, 6}


def level(task: str, layer: int | None) -> Level:
    at = 30 if layer is None else layer
    return Level(task, "accuracy", layer, at, at, 10, np.full(20, at))


def test_the_order_is_said_as_it_is() -> None:
    choice, pope, captions = level("scienceqa", 6), level("pope", 8), level("captions", 12)
    text = order_text([choice, pope, captions])
    assert "layer 6" in text and "100 % of the resamples" in text and "the order is found" in text
    swapped = order_text([level("pope", 4), choice, captions, level("words", 14)])
    assert "is not found" in swapped
    assert (
        "earlier than multiple choice: pope" in swapped and "later than captions: words" in swapped
    )
    same = order_text([replace(each, layer=6) for each in (choice, pope, captions)])
    assert "all tasks level off at the same layer" in same
    assert "no order can be told" in order_text([pope])
    tie = order_text([choice, pope, captions, level("words", 12)])
    assert "the order is found; at the same layer as captions: words." in tie
    unlearnt = level("counting", None)  # says nothing about the order
    assert "the order is found" in order_text([choice, pope, captions, unlearnt])
    assert "no order can be told" in order_text([choice, level("captions", None)])


def test_a_task_that_the_picture_does_not_help_has_no_layer() -> None:
    rng = np.random.default_rng(1)
    guesses = rng.random((5, 60)) < 0.5
    guesses[-1] = guesses[0]
    layer, _ = bootstrap_levels(counts_of_units(guesses), accuracy, "accuracy", CLIFFS, 200)
    assert layer is None
    guesses[-1] = True
    layer, _ = bootstrap_levels(counts_of_units(guesses), accuracy, "accuracy", CLIFFS, 200)
    assert layer == 8


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_resamples_give_the_share_in_which_one_is_earlier(share: float) -> None:
    draws = np.where(np.arange(20) < 20 * share, 4, 12)
    first = replace(level("scienceqa", 4), draws=draws)
    assert f"{100 * share:.0f} % of the resamples" in order_text([first, level("captions", 12)])


def test_a_step_that_was_done_again_counts_last() -> None:
    rows = [
        {"stage": "lora", "s": 1.0, "step": 100, "presence": 0.5, "choice": 0.2},
        {"stage": "lora", "s": 2.0, "step": 110, "loss": 0.4},
        {"stage": "vision", "s": 2.0, "step": 250, "thing_accuracy": 0.1},
        {"stage": "lora", "s": 3.0, "step": 200, "presence": 0.7, "choice": 0.3},
        {"stage": "lora", "s": 1.0, "step": 100, "presence": 0.6, "choice": 0.25},
    ]
    steps, values = checks_of(rows, "lora", "presence")
    assert steps == [100, 200]
    assert values == {"presence": [0.6, 0.7], "choice": [0.25, 0.3]}
    assert checks_of(rows, "small", "presence") == ([], {})
