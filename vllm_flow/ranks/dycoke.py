"""One frame of four whole, and of the others what it does not show already: DyCoke's choice among a video's frames.

"DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models" (arXiv 2411.15024), section 3.2, of which
this is the token compression across frames. What it does besides while it generates, which drops keys and takes them
back, is not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks import unlike
from vllm_flow.ranks.base import FrameRank
from vllm_flow.ranks.budgets import counting, places, sizes

if TYPE_CHECKING:
    import torch

WINDOW = 4
"""Frames, of which the first stays whole."""


def least_repeated(embeddings_NH: torch.Tensor, frame_N: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices of the tokens: those of no frame, those of every window's first frame, then of the others those
    least like the token at the same place of the frame that theirs is compared with, as many of each frame.

    The second frame of a window and the third are compared with its first, the fourth with the third. Where not even
    the first ones can stay, for which nothing is published, as many of each stay, by the same measure: compared with
    the window before.
    """
    total, group_N = len(frame_N), frame_N + 1
    groups = total + 1 + WINDOW
    size_G = sizes(group_N, groups)
    first_G = size_G.cumsum(0) - size_G
    at_N = counting(group_N)
    phase_N = frame_N % WINDOW
    back_N = 1 + (phase_N == 2).long() + (WINDOW - 1) * (phase_N == 0).long()
    compared_N = frame_N >= back_N
    other_N = (at_N - first_G[group_N] + first_G[(group_N - back_N).clamp_min(0)]).where(
        compared_N, at_N
    )
    tokens_NH = unlike.unit(embeddings_NH)
    alike_N = tokens_NH.new_empty(total)
    for rows in unlike.row_blocks(total, tokens_NH.shape[1]):
        alike_N[rows] = (tokens_NH[rows] * tokens_NH[other_N[rows]]).sum(-1)
    place_N = places(-alike_N.masked_fill(~compared_N, 0), group_N, groups)
    later_N = (phase_N > 0) & (frame_N >= 0)
    key_N = (place_N + total * later_N).masked_fill(frame_N < 0, -1)
    return key_N.argsort(stable=True)[:keep]


DYCOKE = FrameRank(
    "dycoke",
    "every fourth frame of a video, and what the frames between do not repeat",
    least_repeated,
)
