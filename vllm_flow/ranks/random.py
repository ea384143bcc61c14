"""Tokens drawn with a seed, the same in every process: the control that no ranking may lose to."""

import numpy as np

from vllm_flow.ranks.base import Draw, PositionRank
from vllm_flow.spans import IntArray


def drawn(total: int, keep: int, draw: Draw) -> IntArray:
    """``keep`` of ``total`` without replacement, each set as likely as any other.

    ``RandomState``'s streams are frozen for good (NEP 19), so versions of numpy agree.
    """
    order = np.random.RandomState([draw.seed, draw.image, draw.layer]).permutation(total)
    stays = np.zeros(total, dtype=np.bool_)
    stays[order[:keep]] = True
    return np.flatnonzero(stays)


RANDOM = PositionRank("random", "tokens drawn with flow_seed", drawn, draws=True)
