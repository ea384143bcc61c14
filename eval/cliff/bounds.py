"""One-sided confidence limits for a paired loss, from what each picture contributes to it. (pure)

Knows arrays of numbers; nothing of tasks, layers or engines.

A loss is *harm* minus *gain*: what the answers that became worse cost, minus what those that became better
bring. Either is a sum of rare events of unequal weight, for which Fay and Feuer (Statistics in Medicine 16
(1997) 791-801) give limits that are exact (Clopper and Pearson's, in the Poisson model) where the weights
are equal. "Square and add" joins the two (Newcombe's method 10, Statistics in Medicine 17 (1998)
2635-2650; as a general recipe: Zou and Donner, Statistics in Medicine 27 (2008) 1693-1702). Where
nothing changed at all, the limit is the exact one for an event that was never seen, so a sample that is
too small shows nothing; a bootstrap would know no width there. Such an event is a picture's: all its questions
may be lost together, and however many they are, a share of the pictures may have been missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2

from vllm_flow.counts import counted

Array = NDArray[np.float64]

NOISE = 1e-12
"""Contributions up to this are rounding."""


@dataclass(frozen=True)
class Loss:
    """How much worse than the baseline, with limits; positive is worse."""

    value: float
    low: float
    """Below it the true loss lies with at most the error rate; the same for `high`, each for itself."""
    high: float
    items: int
    """Questions it is made from."""


def loss_limits(
    contributions: ArrayLike,
    step: float,
    items: int,
    confidence: float = 0.95,
    units: int | None = None,
) -> Loss:
    """The loss that a sample shows, with two one-sided limits, each at `confidence`.

    Args:
        contributions: [U] what each unit (a picture with its questions) adds to the loss; their sum is the
            loss. Positive is worse.
        step: what one changed answer adds at most, 1 / questions for a mean. An event that was not seen
            is taken to weigh as much as the largest that was, and no less than this.
        items: questions behind the contributions.
        units: pictures behind them, changed or not; None for as many as questions. Neither harm nor gain is said to
            be less than the share of them that may have been missed altogether.

    Raises:
        ValueError: no questions, no pictures or more of them, a step that is not positive, or a confidence
            outside (0.5, 1).
    """
    if items < 1 or not step > 0:
        raise ValueError(f"a loss needs questions and a positive step, got {items} and {step}")
    if not 0.5 < confidence < 1:
        raise ValueError(f"the confidence must lie between 0.5 and 1, got {confidence}")
    if units is not None and not 1 <= units <= items:
        raise ValueError(
            f"{counted(items, 'question')} cannot be about {counted(units, 'picture')}"
        )
    missed = smallest_tolerance(items if units is None else units, confidence)
    changes = np.asarray(contributions, dtype=np.float64)
    harm, gain = changes[changes > NOISE], -changes[changes < -NOISE]
    h, g = float(harm.sum()), float(gain.sum())
    value = h - g
    harm_low, harm_high = _limits(harm, step, confidence)
    gain_low, gain_high = _limits(gain, step, confidence)
    return Loss(
        value,
        value - math.hypot(h - harm_low, max(gain_high, missed) - g),
        value + math.hypot(max(harm_high, missed) - h, g - gain_low),
        items,
    )


def _limits(weights: Array, step: float, confidence: float) -> tuple[float, float]:
    """Fay and Feuer's lower and upper limit for a weighted sum of Poisson counts, each counted once."""
    total, square = float(weights.sum()), float((weights**2).sum())
    low = 0.0
    if total > 0:
        low = square / (2 * total) * float(chi2.ppf(1 - confidence, 2 * total**2 / square))
    unseen = max(step, float(weights.max(initial=0.0)))
    total, square = total + unseen, square + unseen**2
    high = square / (2 * total) * float(chi2.ppf(confidence, 2 * total**2 / square))
    return low, high


def smallest_tolerance(pictures: int, confidence: float = 0.95) -> float:
    """The upper limit of a loss where not one answer about so many pictures changed: no tolerance below can be shown.

    The exact one of a Poisson count that is 0.
    """
    return -math.log1p(-confidence) / pictures


def pictures_for(tolerance: float, confidence: float = 0.95) -> int:
    """Pictures from which on `tolerance` can be shown, if not one answer changes."""
    return math.ceil(smallest_tolerance(1, confidence) / tolerance)
