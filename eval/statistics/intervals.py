"""Statistics: right/wrong answers, many comparisons at once, what a sample could have shown. (pure)

Knows only booleans, counts, numbers and p values; nothing of tasks, models or cliffs. Metrics other than a
share of right answers: `vllm_flow.eval.statistics.bootstrap`. Sources:

- Wilson's score interval: E. B. Wilson, JASA 22 (1927) 209-212, as implemented by scipy.
- Exact McNemar test: the discordant pairs follow Binomial(b + c, 1/2) under the null hypothesis.
- Paired interval: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10 ("square
  and add" of Wilson intervals), recommended for paired proportions by Fagerland, Lydersen and
  Laake, Statistics in Medicine 33 (2014) 2850-2875.
- Interval of a median: order statistics, whose ranks are quantiles of Binomial(n, 1/2), as implemented by scipy
  (W. J. Conover, Practical Nonparametric Statistics, 3rd ed. 1999, section 3.2). It asks nothing of the distribution.
- Holm's correction: S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70 (here, since
  statsmodels collects garbage on each call, which takes longer than a whole report).
- Minimum detectable difference: H. S. Bloom, Evaluation Review 19 (1995) 547-556: a true difference
  of (z of the level + z of the power) standard errors is found with that power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median as middle

from scipy.stats import binomtest, norm, quantile_test
from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval: `low <= value <= high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """How a treatment's accuracy differs from the baseline's on the same questions."""

    difference: Interval
    """Treatment minus baseline, in [-1, 1]."""
    p_value: float
    """Exact two-sided McNemar p."""
    gained: int
    """Questions only the treatment answers rightly."""
    lost: int
    """Questions only the baseline answers rightly."""


def accuracy(correct: int, total: int, confidence: float = 0.95) -> Interval:
    """Share of right answers with Wilson's score interval.

    ValueError unless 0 <= correct <= total and total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(
            f"accuracy needs 0 <= correct <= total and total > 0, got {correct}/{total}"
        )
    limits = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    share = correct / total
    # Rounding can put a limit a few ulps on the wrong side of a share of 0 or 1.
    return Interval(share, min(float(limits.low), share), max(float(limits.high), share))


def between(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """The mean over further draws of a chance (seeds), from the values of some: Student's interval.

    It says how far the draws alone move the mean, on the same questions; None for fewer than two of them.
    """
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    spread = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    half = float(student.ppf((1 + confidence) / 2, len(values) - 1)) * spread
    return Interval(mean, mean - half, mean + half)


def median(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """The median of what the values were drawn from, independently: their own, between two of them.

    None where too few values were drawn: all of n lie on one side of it with the chance 2 ** (1 - n), so that 95 %
    needs six of them. The interval covers with at least that confidence, whatever the distribution.

    ValueError without a value.
    """
    if not len(values):
        raise ValueError("a median needs at least one value")
    ci = quantile_test(values, p=0.5).confidence_interval(confidence)
    # In a sample too small for one of the limits scipy gives it as not a number.
    if not (isfinite(ci.low) and isfinite(ci.high)):
        return None
    return Interval(middle(values), float(ci.low), float(ci.high))


def clustered_share(
    right: Sequence[float], units: Sequence[int], confidence: float = 0.95
) -> Interval:
    """Share of right answers where those of one unit (a picture) go together: Wilson's interval of as many
    independent answers as they are worth.

    That number is the answers' over the design effect (L. Kish, Survey Sampling, 1965; for Wilson's
    interval: C. Franco et al., Journal of Survey Statistics and Methodology 7 (2019) 334-364), never more
    than there are; where all answers agree, the number of units. An effect that few units tell is itself
    uncertain, so the number shrinks by the squared ratio of Student's quantiles for answers and for units
    (E. L. Korn and B. I. Graubard, Survey Methodology 24 (1998) 193-201).

    ValueError unless there is an answer and a unit for each.
    """
    if len(right) == 0 or len(right) != len(units):
        raise ValueError(f"a share needs answers, a unit for each; got {len(right)}, {len(units)}")
    number, share = len(right), sum(right) / len(right)
    residuals: dict[int, float] = {}
    for unit, one in zip(units, right, strict=True):
        residuals[unit] = residuals.get(unit, 0.0) + one - share
    worth = float(len(residuals))
    if 0 < share < 1 and worth > 1:
        # Of the mean's variance, as the units have it and as independent answers would.
        clustered = worth / (worth - 1) * sum(r * r for r in residuals.values()) / number**2
        plain = share * (1 - share) / (number - 1)
        known = student.ppf((1 + confidence) / 2, [number - 1, worth - 1])
        worth = number / max(clustered / plain, 1.0) * float(known[0] / known[1]) ** 2
    z = float(norm.ppf((1 + confidence) / 2))
    middle = (share + z * z / (2 * worth)) / (1 + z * z / worth)
    half = z / (1 + z * z / worth) * sqrt(share * (1 - share) / worth + z * z / (4 * worth**2))
    return Interval(share, min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share))


def paired_difference(
    baseline: Sequence[bool], treatment: Sequence[bool], confidence: float = 0.95
) -> PairedDifference:
    """Compare right/wrong answers to the same questions, in the same order.

    ValueError when the sequences are empty or differ in length.
    """
    if len(baseline) != len(treatment) or not baseline:
        raise ValueError(
            f"paired answers must be of one length > 0, got {len(baseline)} and {len(treatment)}"
        )
    pairs = list(zip(baseline, treatment, strict=True))
    both = sum(1 for b, t in pairs if b and t)
    gained = sum(1 for b, t in pairs if t and not b)
    lost = sum(1 for b, t in pairs if b and not t)
    neither = len(pairs) - both - gained - lost
    return PairedDifference(
        difference=newcombe_interval(both, gained, lost, neither, confidence),
        p_value=mcnemar_p(gained, lost),
        gained=gained,
        lost=lost,
    )


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p from the discordant pairs; 1 where there are none."""
    if gained + lost == 0:
        return 1.0
    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def newcombe_interval(
    both: int, gained: int, lost: int, neither: int, confidence: float = 0.95
) -> Interval:
    """Newcombe's method 10 for the difference of paired proportions, treatment minus baseline.

    The counts are the cells of the 2 x 2 table: right in both, in the treatment only, in the
    baseline only, in neither.
    """
    total = both + gained + lost + neither
    treatment = accuracy(both + gained, total, confidence)
    baseline = accuracy(both + lost, total, confidence)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    cross = both * neither - gained * lost
    # Newcombe's continuity correction applies to positive association only.
    corrected = max(cross - total / 2, 0.0) if cross > 0 else float(cross)
    phi = corrected / sqrt(margins) if margins else 0.0
    difference = treatment.value - baseline.value

    def spread(treatment_limit: float, baseline_limit: float) -> float:
        a, b = abs(treatment_limit - treatment.value), abs(baseline_limit - baseline.value)
        return sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return Interval(
        difference,
        max(difference - spread(treatment.low, baseline.high), -1.0),
        min(difference + spread(treatment.high, baseline.low), 1.0),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: below a level with at most that chance of any
    false finding among all of them, whatever their dependence."""
    total, highest = len(p_values), 0.0
    adjusted = [0.0] * total
    for rank, index in enumerate(sorted(range(total), key=lambda i: p_values[i])):
        highest = max(highest, min((total - rank) * p_values[index], 1.0))
        adjusted[index] = highest
    return adjusted


def minimum_detectable(
    standard_error: float, comparisons: int = 1, confidence: float = 0.95, power: float = 0.8
) -> float:
    """The true difference that a two-sided test finds with probability `power`.

    Args:
        standard_error: of the estimated difference, in its unit (which the result has as well).
        comparisons: tests made together. The level is divided by it (Bonferroni), which is what
            Holm's correction asks of the smallest p, so the result errs on the large side.

    Normal approximation. It says what the sample could have shown; it is not the power of the
    observed difference.
    """
    level = (1 - confidence) / max(comparisons, 1)
    return float((norm.ppf(1 - level / 2) + norm.ppf(power)) * standard_error)


def unseen_share(trials: int, confidence: float = 0.95) -> float:
    """Largest share of something that `trials` independent trials may have missed altogether.

    The upper Clopper-Pearson limit of 0 out of `trials`, two-sided: about 3.7 / trials at 95 %.
    ValueError unless trials > 0.
    """
    if trials < 1:
        raise ValueError(f"a share needs at least one trial, got {trials}")
    return float(1 - ((1 - confidence) / 2) ** (1 / trials))
