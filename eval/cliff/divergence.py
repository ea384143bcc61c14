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


@dataclass(frozen=True)
class Mean:
    """A mean over questions with its bootstrap interval."""

    value: float
    low: float
    high: float


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
    """Means over questions of [L, N] values, one per layer, with percentile intervals.

    Units are resampled once for all layers, since all layers were asked the same questions.

    Args:
        units: [N] which unit each question belongs to, numbered from 0: its picture. Without it every
            question is one.
    """
    array = np.asarray(values, dtype=np.float64)
    place = np.arange(array.shape[1]) if units is None else np.asarray(units)
    count = int(place.max()) + 1
    sizes = np.bincount(place, minlength=count)
    sums = np.zeros((count, len(array)))
    np.add.at(sums, place, array.T)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    sampled = (drawn @ sums) / (drawn @ sizes)[:, None]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(sampled, tails, axis=0)
    mean = array.mean(axis=1)
    return [
        Mean(float(m), min(float(a), float(m)), max(float(b), float(m)))
        for m, a, b in zip(mean, low, high, strict=True)
    ]


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
