"""Two ranks: the middle of the picture, and the tokens that are least like the picture's average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_flow.ranks import PictureRank, PositionRank
from vllm_flow.ranks.base import Draw
from vllm_flow.spans import IntArray

if TYPE_CHECKING:
    import torch


def middle(total: int, keep: int, draw: Draw) -> IntArray:
    """``keep`` consecutive tokens in reading order, as many before them as behind."""
    first = (total - keep) // 2
    return np.arange(first, first + keep, dtype=np.int64)


def far_from_mean(embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices, the farthest from the mean of all tokens first; of equals, the first token."""
    tokens_NH = embeddings_NH.float()
    apart_N = (tokens_NH - tokens_NH.mean(0)).norm(dim=-1)
    return apart_N.argsort(descending=True, stable=True)[:keep]


CENTER = PositionRank("center", "the middle in reading order", middle)
FAR_FROM_MEAN = PictureRank("far_from_mean", "far from the picture's mean embedding", far_from_mean)
