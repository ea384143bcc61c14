"""Paired comparisons of any metric that is made of counts: intervals, p values, standard errors. (pure)

Knows only arrays of counts and a function from their sums to metrics; nothing of tasks or policies.
So it serves ratios such as F1 or CHAIR as well as means: what is resampled are the counts, and the
metric is computed anew from each resample's sums. One matrix product makes the sums of all resamples.

Shape letters: P treatments (policies), U units, K kinds of counts, R resamples.

A *unit* is what was sampled independently: a picture, with all questions about it. Questions about one
picture share its difficulty, and POPE asks some of them three times, so resampling single questions
would make intervals too narrow (Cameron, Gelbach and Miller, Review of Economics and Statistics 90
(2008) 414-427).

- Intervals: BCa bootstrap, B. Efron, JASA 82 (1987) 171-185, of whole units, in both arms at once.
- p values: paired randomisation test (Fisher; E. W. Noreen, Computer-Intensive Methods for Testing
  Hypotheses, 1989): if the treatment changes nothing, a unit's two results may be swapped. With single
  right/wrong answers as units it is McNemar's test, by simulation. p = (1 + as extreme) / (1 + swaps).
- Where no unit differs, every resample is the same and the bootstrap knows no width. The interval then
  allows for as many changed units as could well have been missed (`unseen_share`), each counted as a
  change of 1: right for means of scores, rough for ratios.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from vllm_flow.eval.statistics.intervals import Interval, unseen_share

Array = NDArray[np.float64]
Metrics = Callable[[Mapping[str, Array]], Mapping[str, Any]]
"""Sums of counts by name, arrays of one shape -> metrics by name, arrays of that shape."""

CHUNK = 4_000_000
"""Entries of a resampling matrix that are held at a time: 32 MB."""

MANY = 200
"""Units of which one more or less in a resample widens an interval by less than a four-hundredth."""

NOISE = 1e-12
"""Differences up to this are rounding."""


@dataclass(frozen=True)
class Comparison:
    """One metric under a treatment and under the baseline, on the same units."""

    baseline: Interval
    treatment: Interval
    difference: Interval
    """Treatment minus baseline."""
    p_value: float
    """Two-sided, of the hypothesis that the treatment changes nothing."""
    standard_error: float
    """Of the difference; 0 where no unit differs."""
    identical: bool
    """Whether every unit has the same counts in both arms."""


def compare(
    names: Sequence[str],
    baseline: Array,
    treatment: Array,
    metrics: Metrics,
    *,
    resamples: int = 2000,
    swaps: int = 9999,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, list[Comparison]]:
    """Compare P treatments with their baselines; per metric one comparison per treatment.

    Args:
        names: the K names of the counts.
        baseline, treatment: [P, U, K], the counts of the units in both arms. A unit that a pair lacks
            has zeros and is not drawn (see `MANY`). Treatments with the same units meet the same resamples.
        metrics: what the sums are worth; called with arrays of shape [R, P].
        resamples, swaps: how many of each; the smallest possible p is 1 / (1 + swaps).
        seed: decides all draws.

    Raises:
        ValueError: shapes that do not fit, or no unit.
    """
    treatments, _, kinds = _common_shape(baseline, treatment, len(names))

    both = np.stack([baseline, treatment])
    draws, swap_draws = np.random.SeedSequence(seed).spawn(2)
    here = _arms(names, both.sum(axis=2)[None], metrics)
    swapped = _arms(names, _swapped_sums(baseline, treatment, swaps, swap_draws), metrics)
    identical = ~np.any(np.abs(treatment - baseline) > NOISE, axis=(1, 2))
    present = np.any(np.abs(both) > NOISE, axis=(0, 3)).sum(axis=1)
    bounds = [unseen_share(int(n), confidence) if n else 1.0 for n in present]
    found: dict[str, dict[int, Comparison]] = {name: {} for name in here[0]}
    for own, units in _with_the_same_units(both):
        flat = both[:, own][:, :, units].transpose(2, 0, 1, 3).reshape(len(units), -1)
        sums = np.concatenate([w @ flat for w in resampling(len(units), resamples, draws)])
        drawn, without = (
            _arms(names, some.reshape(-1, 2, len(own), kinds), metrics)
            for some in (sums, flat.sum(axis=0) - flat)
        )
        for name, (place, p) in itertools.product(here[0], enumerate(own)):
            found[name][p] = _comparison(
                _at(here, name, p),
                _at(drawn, name, place),
                _at(without, name, place),
                _at(swapped, name, p),
                bounds[p],
                confidence,
                identical=bool(identical[p]),
            )
    return {name: [of[p] for p in range(treatments)] for name, of in found.items()}


def _with_the_same_units(both: Array) -> Iterator[tuple[list[int], NDArray[np.intp]]]:
    """Treatments that have the same units, and these: only what is there can be drawn.

    Of a pair with few units among many, some resamples would else hold none of it, and all others differ in how
    many they hold. Of a pair with `MANY` that hardly matters, and of one without any all stand for it.
    """
    there = np.any(np.abs(both) > NOISE, axis=(0, 3))
    number = there.sum(axis=1)
    there[(number == 0) | (number >= MANY)] = True
    alike: dict[bytes, list[int]] = {}
    for treatment, own in enumerate(there):
        alike.setdefault(own.tobytes(), []).append(treatment)
    for treatments in alike.values():
        yield treatments, np.flatnonzero(there[treatments[0]])


def _swapped_sums(
    baseline: Array, treatment: Array, swaps: int, seed: np.random.SeedSequence
) -> Array:
    """[R, 2, P, K]: sums of both arms where units have swapped them at random."""
    treatments, units, kinds = baseline.shape
    moved = (treatment - baseline).transpose(1, 0, 2).reshape(units, -1)
    shift = np.concatenate([s @ moved for s in swapping(units, swaps, seed)])
    shift = shift.reshape(-1, treatments, kinds)
    return np.stack([baseline.sum(1) + shift, treatment.sum(1) - shift], axis=1)


def _common_shape(baseline: Array, treatment: Array, kinds: int) -> tuple[int, int, int]:
    if baseline.shape != treatment.shape or baseline.ndim != 3 or baseline.shape[2] != kinds:
        raise ValueError(
            f"counts must be two arrays [treatments, units, {kinds}], "
            f"got {baseline.shape} and {treatment.shape}"
        )
    treatments, units, _ = baseline.shape
    if not units or not treatments:
        raise ValueError("a comparison needs at least one treatment and one unit")
    return treatments, units, kinds


Arms = tuple[dict[str, Array], dict[str, Array]]
"""What baseline and treatment are worth, per metric."""


def _arms(names: Sequence[str], sums: Array, metrics: Metrics) -> Arms:
    """What both arms are worth by their sums [R, 2, P, K]; [R, P] per metric."""
    return _worth(names, sums[:, 0], metrics), _worth(names, sums[:, 1], metrics)


def _at(arms: Arms, metric: str, treatment: int) -> tuple[Array, Array]:
    """One metric of one treatment, [R] per arm."""
    return arms[0][metric][:, treatment], arms[1][metric][:, treatment]


def _worth(names: Sequence[str], sums: Array, metrics: Metrics) -> dict[str, Array]:
    """[..., P, K] sums -> [..., P] per metric."""
    found = metrics({name: sums[..., k] for k, name in enumerate(names)})
    return {
        name: np.broadcast_to(np.asarray(value, dtype=np.float64), sums.shape[:-1])
        for name, value in found.items()
    }


def _comparison(
    here: tuple[Array, Array],
    drawn: tuple[Array, Array],
    without: tuple[Array, Array],
    swapped: tuple[Array, Array],
    bound: float,
    confidence: float,
    *,
    identical: bool,
) -> Comparison:
    """One metric of one treatment beside its baseline.

    Args:
        here, drawn, without, swapped: baseline and treatment on the sample ([1]), on its resamples,
            without one unit each, and with arms swapped at random.
        bound: share of units that the sample may have failed to show.
    """
    sides = [
        interval(float(at[0]), sample, out, bound, confidence)
        for at, sample, out in zip(here, drawn, without, strict=True)
    ]
    difference, drawn_difference = here[1][0] - here[0][0], drawn[1] - drawn[0]
    extreme = np.abs(swapped[0] - swapped[1]) >= np.abs(difference) - NOISE
    return Comparison(
        baseline=sides[0],
        treatment=sides[1],
        difference=interval(
            float(difference),
            drawn_difference,
            without[1] - without[0],
            bound,
            confidence,
            floor=-1.0,
        ),
        p_value=float((1 + extreme.sum()) / (1 + len(extreme))),
        standard_error=float(np.std(drawn_difference)),
        identical=identical,
    )


def interval(
    value: float,
    samples: Array,
    without: Array,
    bound: float,
    confidence: float = 0.95,
    floor: float = 0.0,
) -> Interval:
    """BCa limits around `value`; `value` -+ `bound` where the samples know no width.

    Args:
        samples: [R] the metric in the resamples.
        without: [U] the metric without each unit (jackknife), for the acceleration.
        bound: half width where all samples agree.
        floor: what the metric cannot fall below; 1 is its ceiling, unless it is above that already.
    """
    if np.ptp(samples) <= NOISE:
        ceiling = 1.0 if value <= 1 else np.inf
        low, high = max(value - bound, floor), min(value + bound, ceiling)
        return Interval(value, min(low, value), max(high, value))
    low, high = bca_limits(value, samples, without, confidence)
    return Interval(value, min(low, value), max(high, value))


def bca_limits(
    value: float, samples: Array, without: Array, confidence: float = 0.95
) -> tuple[float, float]:
    """Efron's bias-corrected and accelerated percentile limits."""
    below = (np.mean(samples < value - NOISE) + np.mean(samples <= value + NOISE)) / 2
    edge = 1 / (2 * len(samples))
    bias = norm.ppf(np.clip(below, edge, 1 - edge))
    deviation = np.mean(without) - without
    square = np.sum(deviation**2)
    acceleration = np.sum(deviation**3) / (6 * square**1.5) if square > NOISE**2 else 0.0
    tails = norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    shifted = bias + tails
    levels = norm.cdf(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(samples, levels)
    return float(low), float(high)


def resampling(units: int, resamples: int, seed: np.random.SeedSequence) -> Iterator[Array]:
    """How often each unit is drawn in each resample, [R', U] at a time; rows sum to U."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(units, resamples):
        drawn = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units)
        yield counts.reshape(rows, units).astype(np.float64)


def swapping(units: int, swaps: int, seed: np.random.SeedSequence) -> Iterator[Array]:
    """Which units keep their arms (1) and which swap them (0), [R', U] at a time."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(units, swaps):
        yield rng.integers(0, 2, (rows, units)).astype(np.float64)


def _chunks(units: int, rows: int) -> Iterator[int]:
    step = max(1, CHUNK // units)
    for start in range(0, rows, step):
        yield min(step, rows - start)
