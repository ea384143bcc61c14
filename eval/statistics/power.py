"""How many questions a tolerance needs, before one is asked. (pure)

The claim to be shown is that a loss is no larger than the tolerance: the upper limit of its interval lies
below. If nothing is lost in truth, a share of the answers still changes, as many for the better as for the worse:
of n independent questions ``c = changed * n``. The observed loss then has the standard deviation sqrt(c) / n, and the
limit lies z sqrt(c + 1) / n above it: Newcombe's interval, whose continuity correction is worth one more changed
answer. So the claim comes out with the wanted power where

    n * tolerance >= z_power * sqrt(c) + z_limit * sqrt(c + 1),

the usual sample size for non-inferiority of paired proportions (J. Liu et al., Statistics in Medicine 21 (2002)
231-245) but for the 1. Beneath it lies the exact bound: so many questions must be asked that a change of the
tolerance's size would hardly have been missed altogether (`unseen_share`).

For means of scores between 0 and 1; for F1 and CHAIR, where an answer moves the metric by about its share, a
rough guide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import sqrt

from scipy.stats import norm

from vllm_flow.counts import counted
from vllm_flow.eval.statistics.intervals import minimum_detectable, unseen_share

CHANGED = (0.02, 0.05, 0.1)
"""Shares of changed answers that a forecast is made for. Policies that lose nothing change a few per cent."""


def questions_needed(
    tolerance: float,
    changed: float,
    *,
    design: float = 1.0,
    confidence: float = 0.95,
    power: float = 0.8,
) -> int:
    """Questions from which on a loss above `tolerance` is ruled out with probability `power`, if nothing is lost.

    Args:
        tolerance: in the metric's unit, a share; above 0.
        changed: share of the answers whose score changes under the policy.
        design: how many questions are worth one independent question (`design_effect`).

    Raises:
        ValueError: a tolerance, share, power or confidence that is none.
    """
    _check(tolerance, changed, confidence, power)

    def enough(number: int) -> bool:
        shown = tolerance_shown(number / design, changed, confidence=confidence, power=power)
        return shown <= tolerance

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def tolerance_shown(
    questions: float, changed: float, *, confidence: float = 0.95, power: float = 0.8
) -> float:
    """The smallest loss that so many independent questions rule out with probability `power`; 1 at most.

    The inverse of :func:`questions_needed`. ValueError as there, and without a question.
    """
    _check(1.0, changed, confidence, power)
    if questions <= 0:
        raise ValueError(f"a tolerance needs questions, got {questions}")
    changes = changed * questions
    chance = float(norm.ppf(power)) * sqrt(changes)
    limit = float(norm.ppf((1 + confidence) / 2)) * sqrt(changes + 1)
    unseen = 1 - ((1 - confidence) / 2) ** (1 / questions)  # unseen_share, of any number
    return float(min(max((chance + limit) / questions, unseen), 1.0))


def design_effect(pictures: Iterable[str], together: float = 1.0) -> float:
    """How many questions are worth one independent one, from the picture of each.

    Args:
        together: correlation of two changes on one picture: 0, independent; 1, all or none. With 1 the
            questions are worth as much as ``N ** 2 / sum(m ** 2)`` for pictures with m questions each.
    """
    sizes = list(Counter(pictures).values())
    if not sizes:
        raise ValueError("a design effect needs questions")
    if not 0 <= together <= 1:
        raise ValueError(f"a correlation lies between 0 and 1, got {together}")
    mean = sum(size * size for size in sizes) / sum(sizes)
    return 1 + (mean - 1) * together


def forecast(
    pictures: Sequence[str], tolerance: float, *, confidence: float = 0.95, power: float = 0.8
) -> str:
    """What questions about these pictures will be able to show, in two sentences.

    Args:
        pictures: the picture of each question.
        tolerance: the loss that is put up with, a share.
    """
    number, distinct = len(pictures), len(set(pictures))
    effect = design_effect(pictures)
    low, _, high = CHANGED

    def shown(changed: float, design: float) -> str:
        return f"{100 * tolerance_shown(number / design, changed, confidence=confidence, power=power):.3g}"

    def needed(changed: float, design: float) -> str:
        return f"{questions_needed(tolerance, changed, design=design, confidence=confidence, power=power)}"

    text = (
        f"{counted(number, 'question')} on {counted(distinct, 'picture')} can rule out a loss of more than "
        f"{shown(low, 1)} to {shown(high, effect)} points; {100 * tolerance:g} "
        f"point{'' if tolerance == 0.01 else 's'} would take {needed(low, 1)} to {needed(high, effect)}"
    )
    spread = f"{100 * low:g} to {100 * high:g} % of the answers changing"
    if distinct < number:
        spread += ", one by one or a picture's together"
    return f"{text} ({spread}, as many for the better)."


def detectable(
    standard_error: float, pictures: int, comparisons: int, confidence: float, power: float
) -> float:
    """The true difference that a sample would have found with that power, of a paired difference's standard error.

    Where nothing changed the error is 0, and allows for as many changed pictures as could have been missed.
    """
    error = standard_error or sqrt(unseen_share(pictures, confidence) / pictures)
    return minimum_detectable(error, comparisons, confidence, power)


def _check(tolerance: float, changed: float, confidence: float, power: float) -> None:
    if not 0 < tolerance <= 1:
        raise ValueError(f"a tolerance lies between 0 and 1, got {tolerance}")
    if not 0 <= changed <= 1:
        raise ValueError(f"the share of changed answers lies between 0 and 1, got {changed}")
    if not 0 < confidence < 1 or not 0.5 <= power < 1:
        raise ValueError(f"no confidence or power: {confidence}, {power}")
