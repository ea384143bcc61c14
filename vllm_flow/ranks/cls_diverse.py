"""Half by the class token's attention, half unlike one another: VisPruner's choice.

"Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (arXiv
2412.01818v2), section 3, as its released code does it with ``important_ratio`` 0.5: the tokens attended
to most, and of the others, in rounds, those most like another one go until as many are left as are wanted.
But how alike two tokens are is told by the embeddings that enter the decoder, not by the tower's features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks import unlike
from vllm_flow.ranks.base import TowerRank

if TYPE_CHECKING:
    import torch

ROUND = 8
"""Tokens that go in a round, at most."""


def important_then_diverse(
    scores_N: torch.Tensor, embeddings_NH: torch.Tensor, keep: int
) -> torch.Tensor:
    """[keep] indices of the tokens, at least one: the half attended to most, then those that outlast the others."""
    order_N = scores_N.argsort(descending=True, stable=True)
    important, rest = order_N[: keep // 2], order_N[keep // 2 :]
    unit_NH = unlike.unit(embeddings_NH)
    while len(rest) > keep - len(important):
        rest = _without_alike(rest, unit_NH, len(rest) - (keep - len(important)))
    found: torch.Tensor = important.new_empty(keep)
    found[: len(important)], found[len(important) :] = important, rest
    return found


def _without_alike(rest: torch.Tensor, unit_NH: torch.Tensor, most: int) -> torch.Tensor:
    """The tokens that are left after a round, in the order in which the next one takes them.

    Every second token is compared with all of the tokens between; those most alike go.
    """
    compared, others = rest[::2], rest[1::2]
    others_H = unit_NH[others].T
    alike = unit_NH.new_empty(len(compared))
    for rows in unlike.row_blocks(len(compared), len(others)):
        alike[rows] = (unit_NH[compared[rows]] @ others_H).max(-1).values
    go = min(ROUND, most, len(compared))
    left = compared[alike.argsort(descending=True, stable=True)[go:]]
    found: torch.Tensor = rest.new_empty(len(left) + len(others))
    found[: len(left)], found[len(left) :] = left, others
    return found


CLS_DIVERSE = TowerRank(
    "cls_diverse",
    "half of them what the vision tower's class token attends to most, half tokens unlike one another",
    important_then_diverse,
    nested=False,
)
