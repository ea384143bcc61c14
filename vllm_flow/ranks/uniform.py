"""Evenly spaced tokens, in reading order: what a ranking must beat to be worth anything."""

import numpy as np

from vllm_flow.ranks.base import Draw, PositionRank
from vllm_flow.spans import IntArray


def evenly(total: int, keep: int, draw: Draw) -> IntArray:
    """The middles of ``keep`` equal parts of ``total``."""
    middles: IntArray = (2 * np.arange(keep, dtype=np.int64) + 1) * total // (2 * keep)
    return middles


UNIFORM = PositionRank("uniform", "tokens evenly spaced in reading order", evenly)
