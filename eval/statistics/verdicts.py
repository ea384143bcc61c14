"""What the numbers say, in words: each comparison's verdict, and from which cliff on nothing is lost. (pure)

Knows comparisons and cliffs; nothing of tasks, files or models. A *loss* is a difference for the worse,
whichever way the metric points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_flow.eval.statistics.intervals import Interval

Finding = Literal["worse", "better", "none", "identical"]


@dataclass(frozen=True)
class Verdict:
    """What one comparison shows."""

    finding: Finding
    """`none` is "no difference found", never "no difference"; `identical`: no unit differs at all."""
    within_tolerance: bool
    """The whole interval of the difference lies within +- the tolerance: an equivalence test at half
    the interval's error rate (two one-sided tests; D. J. Schuirmann, Journal of Pharmacokinetics and
    Biopharmaceutics 15 (1987) 657-680, needs the 90 % interval for 5 %)."""


@dataclass(frozen=True)
class CliffEvidence:
    """What a sweep says about one cliff."""

    cliff: int
    loss: Interval
    """Positive is worse than the baseline."""
    p_corrected: float
    unseen: float = 0.0
    """Share of lost answers that so few pictures may have missed altogether (`unseen_share`). Resampled
    intervals do not know it: where no answer was lost, no resample loses one."""


@dataclass(frozen=True)
class FoundCliff:
    """From which cliff on nothing is lost: an optimistic and a cautious reading of one sweep."""

    found: int | None
    """Smallest cliff such that at it and at every deeper cliff asked no loss was found: none with
    both a corrected p below the level and a size beyond the tolerance. None where the deepest cliff
    has one. A small sample finds little, and so puts this too low."""
    shown: int | None
    """Smallest cliff such that at it and at every deeper cliff asked the interval puts the loss at no
    more than the tolerance, and the pictures are enough to have met a loss of that size. None where the
    deepest cliff does not. A small sample shows little, and so puts this too high. The cliffs are
    tested from the deepest down to the first failure, an order fixed beforehand, which needs no
    correction (W. Maurer, L. A. Hothorn and W. Lehmacher, in Biometrie in der chemisch-pharmazeutischen
    Industrie 6 (1995) 3-18)."""
    tolerance: float
    asked: tuple[int, ...]
    """Ascending."""
    seen: int | None = None
    """Smallest cliff such that at it and at every deeper cliff asked the observed loss is no more than the
    tolerance, whatever chance made of it. Never above `shown`, never below `found`: where `found` is below it, the
    questions were too few to call a visible loss one. None where the deepest cliff lost more."""

    @property
    def too_few(self) -> bool:
        """Whether the questions show no cliff, though no loss was found at the deepest one either."""
        return self.shown is None and self.found is not None


def judge(
    difference: Interval,
    p_corrected: float,
    *,
    identical: bool,
    higher_is_better: bool,
    tolerance: float,
    level: float = 0.05,
    unseen: float = 0.0,
) -> Verdict:
    """The verdict on one difference (treatment minus baseline); `unseen` as in `CliffEvidence`."""
    finding: Finding = "none"
    if identical:
        finding = "identical"
    elif p_corrected < level and difference.value != 0:
        finding = "better" if (difference.value > 0) == higher_is_better else "worse"
    within = -tolerance <= difference.low and difference.high <= tolerance
    return Verdict(finding, within and unseen <= tolerance)


def loss_of(difference: Interval, higher_is_better: bool) -> Interval:
    """A difference as a loss: positive is worse."""
    if not higher_is_better:
        return difference
    return Interval(-difference.value, -difference.high, -difference.low)


def find_cliff(
    evidence: Sequence[CliffEvidence], tolerance: float, level: float = 0.05
) -> FoundCliff:
    """Read a sweep from its deepest cliff down; see `FoundCliff`."""
    ordered = sorted(evidence, key=lambda e: -e.cliff)
    found = shown = seen = None
    for one in ordered:
        if one.p_corrected < level and one.loss.value > tolerance:
            break
        found = one.cliff
    for one in ordered:
        if one.loss.value > tolerance:
            break
        seen = one.cliff
    for one in ordered:
        if max(one.loss.high, one.unseen) > tolerance:
            break
        shown = one.cliff
    asked = tuple(e.cliff for e in reversed(ordered))
    return FoundCliff(found, shown, tolerance, asked, seen)
