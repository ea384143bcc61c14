"""What a heat map says in numbers: where its maximum is, how much lies in a box, how spread it is. (pure)

Knows arrays only; nothing of models. A heat map is [rows, columns], not negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_flow.analysis.exact import clopper_pearson, poisson_binomial_tail

Floats = NDArray[np.floating]

INSIDE = 0.5
"""A patch counts as inside a box that covers at least this share of it."""


def check_box(box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    """ValueError unless left, top, right, bottom lie in this order inside a picture of `size`, in pixels."""
    left, top, right, bottom = box
    width, height = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"box {left:g},{top:g},{right:g},{bottom:g} is not inside the picture of "
            f"{width} x {height} pixels: give left,top,right,bottom"
        )


def normalised(heat: Floats) -> NDArray[np.float64]:
    """Divided by its maximum; a map without any heat stays zero."""
    peak = float(heat.max())
    values = np.asarray(heat, dtype=np.float64)
    return values / peak if peak > 0 else np.zeros_like(values)


def entropy(heat: Floats) -> float:
    """Entropy of the heat as a distribution over patches, divided by that of an even one.

    1 is spread evenly, 0 is one patch; NaN where there is no heat.
    """
    total = float(heat.sum())
    if total <= 0:
        return float("nan")
    share = np.asarray(heat, dtype=np.float64).ravel() / total
    share = share[share > 0]
    return float(-(share * np.log(share)).sum() / np.log(heat.size))


def mass_inside(heat: Floats, coverage: Floats) -> float:
    """Share of the heat inside a box that covers [rows, columns] shares of the patches; NaN without heat.

    By chance, with the heat spread evenly, it is `coverage.mean()`.
    """
    total = float(heat.sum())
    return float((heat * coverage).sum() / total) if total > 0 else float("nan")


def points_inside(heat: Floats, coverage: Floats) -> bool:
    """The pointing game: whether the hottest patch is inside the box. No heat points nowhere."""
    return bool(heat.max() > 0 and coverage.flat[int(np.argmax(heat))] >= INSIDE)


def pointing_chance(coverage: Floats) -> float:
    """Probability that a patch drawn at random is inside the box."""
    return float((coverage >= INSIDE).mean())


@dataclass(frozen=True)
class Hits:
    """How often the hottest patch was inside the box."""

    hits: int
    total: int
    low: float
    high: float
    """Exact (Clopper-Pearson) 95 % interval of the share."""
    chance: float
    """Share expected of a patch drawn at random: the boxes' mean share of the picture."""
    p_value: float
    """Probability of at least so many hits by chance, each box with its own share (one-sided)."""

    @property
    def share(self) -> float:
        return self.hits / self.total


def count_hits(hits: Sequence[bool], chances: Sequence[float]) -> Hits:
    """Sum up a pointing game whose rounds have different chances."""
    count, total = sum(map(bool, hits)), len(hits)
    low, high = clopper_pearson(count, total)
    return Hits(
        count, total, low, high, float(np.mean(chances)), poisson_binomial_tail(chances, count)
    )
