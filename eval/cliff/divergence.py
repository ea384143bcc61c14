"""A cliff without labels: how far the next-token distribution moves when the image goes. (pure)

Knows arrays; nothing of engines or files. The rule is that of VTW ("Boosting Multimodal Large Language
Models with Visual Tokens Withdrawal for Rapid Inference", arXiv 2405.05803): on a few dozen questions, the
divergence between the distributions with the image in all layers and in that many layers, its mean against
a threshold. Its released code (github.com/lzhxmu/VTW at a3d8cfc, `lmms_eval/__main__.py` and `VTW.py`) takes
20 questions, the first layer from 5 on whose mean KL(truncated || full) is at most 0.003 (0.0005 for
LLaVA-1.5-13B, 0.0001 for LLaVA-1.6-7B). Ours differs in two ways: the divergence is KL(full || truncated),
what is lost of the baseline's distribution (to second order in small changes the two are equal), and every
deeper layer must keep the threshold too.

Shapes: L layers, N questions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Reading = Literal["mean", "upper"]

FEWEST_PICTURES = 5
"""Of which an interval is made: resampling fewer hardly varies, and of one nothing."""

NOISE = 1e-7
"""A standard error that is so small beside the mean is rounding."""


@dataclass(frozen=True)
class Mean:
    """A mean over questions with its bootstrap interval."""

    value: float
    low: float
    high: float


UNBOUNDED = Mean(np.inf, 0.0, np.inf)
"""Of values of which one is infinite."""


def divergence(full: ArrayLike, truncated: ArrayLike) -> float:
    """Kullback-Leibler divergence KL(full || truncated) in nats, from log-probabilities [V].

    Both are normalised over V first, so that rounding in the engine cannot make it negative. A token
    that only `full` allows makes it infinite.
    """
    p, q = (_normalised(np.asarray(x, dtype=np.float64)) for x in (full, truncated))
    likely = p > -np.inf
    with np.errstate(invalid="ignore"):
        terms = np.exp(p[likely]) * (p[likely] - q[likely])
    return max(float(terms.sum()), 0.0)


def bootstrap_means(
    values: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
    units: Sequence[int] | None = None,
) -> list[Mean]:
    """Means over questions of [L, N] values, one per layer, with bootstrap intervals.

    Divergences are skewed: most questions hardly move, a few move far, and a sample may have met none of these. So
    limits are studentised (the bootstrap-t: P. Hall, Annals of Statistics 16 (1988) 927-953): a resample's mean is
    told in standard errors of its own, which are small where it met few of them. Percentiles of the means put the
    upper limit of a few dozen questions too low in one sample of five to eight, where one of forty is meant.

    Of fewer units than `FEWEST_PICTURES` the limits are only the lowest unit's mean and the highest's.
    Otherwise units are resampled once for all layers, since all layers were asked the same questions.

    Args:
        values: none negative; an infinite one makes the mean and its upper limit infinite.
        units: [N] which unit each question belongs to, numbered from 0: its picture. Without it every
            question is one.
    """
    array = np.asarray(values, dtype=np.float64)
    known = np.asarray(np.isfinite(array).all(axis=1))
    place = np.arange(array.shape[1]) if units is None else np.asarray(units)
    count = int(place.max()) + 1
    sizes = np.bincount(place, minlength=count).astype(np.float64)
    sums = np.zeros((count, len(array)))
    np.add.at(sums, place, np.where(known[:, None], array, 0.0).T)
    mean, error = (part[0] for part in _means(np.ones((1, count)), sums, sizes))
    if count < FEWEST_PICTURES:
        each = sums / sizes[:, None]
        rows = zip(mean, each.min(axis=0), each.max(axis=0), known, strict=True)
        return [Mean(*map(float, row)) if finite else UNBOUNDED for *row, finite in rows]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    means, errors = _means(drawn.astype(np.float64), sums, sizes)
    # A resample of one unit alone has no error.
    moved = np.full_like(means, np.nan)
    np.divide(means - mean, errors, out=moved, where=errors > NOISE * np.abs(mean))
    moved[:, error <= NOISE * np.abs(mean)] = 0.0
    high, low = np.nanquantile(moved, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [
        Mean(float(m), max(min(float(m - b * e), float(m)), 0.0), max(float(m - a * e), float(m)))
        if finite
        else UNBOUNDED
        for m, e, a, b, finite in zip(mean, error, high, low, known, strict=True)
    ]


def _means(drawn: Array, sums: Array, sizes: Array) -> tuple[Array, Array]:
    """Means over questions and their standard errors, [R, L] each, of units drawn so often [R, U].

    Args:
        sums, sizes: [U, L], [U] of each unit's questions.
    """
    number = (drawn @ sizes)[:, None]
    mean = drawn @ sums / number
    square = drawn @ sums**2 - 2 * mean * (drawn @ (sums * sizes[:, None]))
    square += mean**2 * (drawn @ sizes**2)[:, None]
    return mean, np.sqrt(np.maximum(square, 0.0)) / number


def stays_below(values: Sequence[float], threshold: float, end: int) -> int:
    """Smallest layer from which on every value is at most `threshold`; `end` where the last is above."""
    layer = end
    for at in range(len(values) - 1, -1, -1):
        if values[at] > threshold:
            break
        layer = at
    return layer


def divergence_cliff(means: Sequence[Mean], threshold: float, reading: Reading) -> int:
    """The layer by the rule: from it on, the mean (as in VTW) or its upper limit stays at or below the threshold.

    The number of layers, which is the baseline, where no layer does.
    """
    values = [mean.value if reading == "mean" else mean.high for mean in means]
    return stays_below(values, threshold, len(means))


def _normalised(logprobs: Array) -> Array:
    top = logprobs.max()
    normalised: Array = logprobs - (top + np.log(np.exp(logprobs - top).sum()))
    return normalised
