"""Chooses within groups of a picture's tokens, each of which has a budget: tiles, crops, frames.

All on the device: how many tokens a group has, and may keep, the host does not know.

Legend: N tokens of an image, G groups, K tokens kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sizes(group_N: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups] how many tokens each has."""
    count_G: torch.Tensor = group_N.new_zeros(groups)
    return count_G.scatter_add_(0, group_N, group_N.new_ones(len(group_N)))


def places(scores_N: torch.Tensor, group_N: torch.Tensor, groups: int) -> torch.Tensor:
    """[N] place of each token in its group, from 0, by descending score; of equals, the first token comes first."""
    best_N = scores_N.argsort(descending=True, stable=True)
    by_group_N = best_N[group_N[best_N].argsort(stable=True)]
    count_G = sizes(group_N, groups)
    first_G = count_G.cumsum(0) - count_G
    place_N: torch.Tensor = group_N.new_empty(len(group_N))
    place_N[by_group_N] = counting(place_N) - first_G[group_N[by_group_N]]
    return place_N


def within_budgets(
    scores_N: torch.Tensor, group_N: torch.Tensor, budget_G: torch.Tensor, keep: int
) -> torch.Tensor:
    """[keep] indices: the tokens of each group with the highest scores, as many as its budget says, best first.

    What a group has no tokens for, and what no budget says, goes to the best of all others: first to the ends of rows
    of patches, whose score is infinite, where the budgets leave room for them. Of equals the first token.

    Args:
        group_N: int64, from 0.
        budget_G: int64, how many each group may keep.
    """
    place_N = places(scores_N, group_N, len(budget_G))
    stays_N = place_N < budget_G[group_N]
    best_N = scores_N.argsort(descending=True, stable=True)
    return best_N[(~stays_N[best_N]).to(place_N.dtype).argsort(stable=True)[:keep]]


def counting(like_N: torch.Tensor) -> torch.Tensor:
    """[N] 0, 1, 2, ..."""
    return like_N.new_ones(len(like_N)).cumsum(0) - 1
