"""Exact statistics of a pointing game: Clopper and Pearson's interval, sums of unequal coins. (pure)

- C. J. Clopper, E. S. Pearson, Biometrika 26 (1934) 404-413, as implemented by scipy.
- The number of hits of independent rounds with unequal chances is Poisson-binomial; its distribution
  is the convolution of the rounds'.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest


def clopper_pearson(hits: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share; ValueError unless 0 <= hits <= total and total > 0."""
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"a share needs 0 <= hits <= total and total > 0, got {hits}/{total}")
    limits = binomtest(hits, total).proportion_ci(confidence, method="exact")
    return float(limits.low), float(limits.high)


def poisson_binomial_tail(chances: Sequence[float], least: int) -> float:
    """P(at least `least` hits) in independent rounds with these chances."""
    distribution: NDArray[np.float64] = np.ones(1)
    for chance in chances:
        distribution = np.convolve(distribution, [1.0 - chance, chance])
    return float(min(1.0, distribution[max(least, 0) :].sum()))


def mcnemar_greater(gained: int, lost: int) -> float:
    """One-sided exact McNemar p: at least so many of the discordant pairs gained, by a fair coin."""
    if gained + lost == 0:
        return 1.0
    return float(binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue)
