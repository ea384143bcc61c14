"""A sparse grid over the picture, and then what `unrotated` puts first: FEATHER's first stage.

"Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration" (arXiv
2412.13180): early attention misses what it needs later, so every part of the picture stays in sight.
"""

import math

import numpy as np

from vllm_flow.ranks.base import Draw
from vllm_flow.ranks.rows import UnrotatedRank
from vllm_flow.ranks.uniform import evenly
from vllm_flow.spans import IntArray

STRIDE = 3
"""Rows and columns of the grid from one token to the next: the released code's."""


def grid(total: int) -> IntArray:
    """Indices of every third token of every third row of a square image.

    Of an image that is no square of tokens, as many evenly spaced ones: how wide it is, is not known here.
    """
    side = math.isqrt(total)
    if side * side != total:
        return evenly(total, -(-total // STRIDE**2), Draw(0, 0, 0))
    places: IntArray = np.arange(total, dtype=np.int64).reshape(side, side)
    return places[::STRIDE, ::STRIDE].ravel()


FEATHER = UnrotatedRank(
    "feather", "every third token of every third row, then as `unrotated`", grid
)
