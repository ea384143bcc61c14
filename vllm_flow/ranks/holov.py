"""Crops of a picture, each with a share of the budget, and of each what is attended to: HoloV's choice.

"Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention" (arXiv 2510.02912), as
its released code does it. Crops are runs of as many tokens each, in reading order.

That code adds to a crop's mean attention the variance of how like its tokens are, scaled to that very mean: every
crop's share then grows by the same 9 % but for what its 1e-6 in a denominator takes, so nothing is compared here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks.base import TowerRank, TowerScore
from vllm_flow.ranks.budgets import within_budgets

if TYPE_CHECKING:
    import torch

CROPS, OF = 1024, 576
"""Crops of a picture of 576 tokens times the tokens kept: 16 where 64 stay, the released code's for LLaVA and, of
any size, for Qwen2.5-VL."""


def crops_of(total: int, keep: int) -> int:
    """How many crops a picture has."""
    return min(total, max(1, CROPS * total // (OF * keep)))


def best_of_crops(scores_N: torch.Tensor, embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices of the tokens, those within the crops' budgets first.

    A crop's share of the budget is that of its mean score in the sum of all, rounded down; what is left over goes to
    the crops of the highest, one each. The ends of rows of patches have no part in that, and stay.
    """
    total = len(scores_N)
    crops = crops_of(total, keep)
    size, longer = divmod(total, crops)  # the first ones have one token more
    at_N = scores_N.new_ones(total).long().cumsum(0) - 1
    in_longer = longer * (size + 1)
    crop_N = (at_N // (size + 1)).where(at_N < in_longer, longer + (at_N - in_longer) // size)
    open_N = scores_N.isfinite()
    # Sums along rows of a table: on CUDA sums by scattering come out in any order, and workers would differ.
    seat_N = at_N - crop_N * size - crop_N.clamp_max(longer)
    table: torch.Tensor = scores_N.new_zeros(2, crops, size + 1).double()
    table[0, crop_N, seat_N] = scores_N.double().masked_fill(~open_N, 0)
    table[1, crop_N, seat_N] = open_N.double()
    sum_C, open_C = table.sum(-1)
    mean_C = sum_C / open_C.clamp_min(1)
    wanted = (keep - (~open_N).sum()).clamp_min(0)
    budget_C = (mean_C / mean_C.sum().clamp_min(1e-30) * wanted).long()
    best_C = mean_C.argsort(descending=True, stable=True)
    over_C = at_N[:crops] < wanted - budget_C.sum()
    budget_C[best_C] += over_C.long()
    group_N = crop_N.masked_fill(~open_N, crops)
    return within_budgets(
        scores_N, group_N, at_N.new_zeros(crops + 1).index_copy_(0, at_N[:crops], budget_C), keep
    )


HOLOV = TowerRank(
    "holov",
    "of each crop what the vision tower's class token attends to most, as many tokens as the crop's share of it",
    best_of_crops,
    nested=False,
)
HOLOV_RECEIVED = TowerRank(
    "holov_received",
    "the same, by what the vision tower's patches attend to: for towers without a class token",
    best_of_crops,
    nested=False,
    score=TowerScore.RECEIVED,
)
