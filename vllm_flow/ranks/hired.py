"""A budget for each tile of a picture, by what the whole picture shows there: HiRED's choice.

"HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models in
Resource-Constrained Environments" (arXiv 2408.10945), sections 3.2 and 3.3, as its released code answers for
LLaVA-NeXT with ``alpha`` 0.5: half of what stays is the whole picture's. The other half is shared out among the tiles
by where the half of the whole picture's tokens lies that the class token attends to most in the tower's first layer;
which tokens of a tile those are says its attention in the layer whose output the decoder gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks.base import TileRank
from vllm_flow.ranks.budgets import places, sizes, within_budgets

if TYPE_CHECKING:
    import torch

WHOLE, OF = 1, 2
"""Of what stays, the whole picture's share; of its tokens, the share that says which tiles show something."""


def shared_out(
    scores_N: torch.Tensor, early_N: torch.Tensor, tile_N: torch.Tensor, keep: int
) -> torch.Tensor:
    """[keep] indices of the tokens, those within the budgets first.

    The released code counts for the i-th tile the i-th of as many equal stretches of the whole picture's tokens in
    reading order, wherever the tile is; so does this. Where there is one tile alone, all of the budget is its own.
    """
    # Group 0: ends of rows. Group 1: the whole picture. Then the tiles.
    groups, group_N = len(tile_N) + 2, tile_N + 1
    size_G, is_whole_N = sizes(group_N, groups), tile_N == 0
    wanted, whole, tiles = (keep - size_G[0]).clamp_min(0), size_G[1], tile_N.max().clamp_min(0)
    own = (wanted * WHOLE // OF).minimum(whole)
    shows_N = is_whole_N & (places(early_N, group_N, groups) < whole * (OF - WHOLE) // OF)
    stretch_N = (is_whole_N.cumsum(0) - 1).clamp_min(0) * tiles // whole.clamp_min(1)
    shown_G = sizes((stretch_N + 2) * shows_N, groups)
    shown_G[:2] = 0
    budget_G = shown_G * (wanted - own) // shown_G.sum().clamp_min(1)
    budget_G[1] = own
    return within_budgets(scores_N, group_N, budget_G, keep)


HIRED = TileRank(
    "hired",
    "half of the whole picture, half of its tiles, the more the more there is to see: what the vision tower's class "
    "token attends to most there",
    shared_out,
    nested=False,
)
