"""Tokens that the class token attends to, each of which takes in those with the likest keys: LLaVA-PruMerge.

"LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388), section 3, as its
released code merges. There the picture says how many tokens stay, by outliers of the attention; here the policy
does, since what is stored is planned before the picture is seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks import unlike
from vllm_flow.ranks.base import TowerRank
from vllm_flow.ranks.cls_attention import most_attended

if TYPE_CHECKING:
    import torch

NEAREST = 32
"""Tokens that each one takes in, the released code's number; fewer where a picture has no more others."""
ATTENDED, OF = 1, 4
"""PruMerge+: of what stays, the share that attention chooses. The released code, as it answers, has evenly spaced
tokens of a third of the distance that attention's number of them would have: three for each of its own."""


def attended_then_spaced(
    scores_N: torch.Tensor, embeddings_NH: torch.Tensor, keep: int
) -> torch.Tensor:
    """[keep] indices of the tokens: those of the highest scores, then evenly spaced ones of the others."""
    order_N = scores_N.argsort(descending=True, stable=True)
    attended = keep * ATTENDED // OF
    rest, spaced = order_N[attended:].sort().values, keep - attended
    middles = (2 * order_N.new_ones(spaced).cumsum(0) - 1) * len(rest) // (2 * spaced)
    found: torch.Tensor = order_N.new_empty(keep)
    found[:attended], found[attended:] = order_N[:attended], rest[middles]
    return found


def with_nearest(
    rows_NC: torch.Tensor, kept_K: torch.Tensor, scores_N: torch.Tensor, keys_ND: torch.Tensor
) -> torch.Tensor:
    """[K, C] to each kept row those of the likest keys are added, each times its own score, whether they stay or go.

    Of equally like ones the first ones. The ends of rows of patches, whose score is infinite, take in nothing and are
    taken in by nothing.
    """
    merged_KC, nearest = rows_NC[kept_K], min(NEAREST, len(rows_NC) - 1)
    rows_NC, unit_ND, open_N = rows_NC.float(), unlike.unit(keys_ND), scores_N.isfinite()
    share_N = scores_N.float()
    taken_KC = rows_NC.new_empty(merged_KC.shape)
    # Sorted, they are held twice, and their places take as much again as both.
    for some in unlike.row_blocks(len(kept_K), 4 * len(rows_NC)):
        kept = kept_K[some]
        alike_kN = (unit_ND[kept] @ unit_ND.T).masked_fill(~open_N, -float("inf"))
        alike_kN.scatter_(1, kept[:, None], -float("inf"))
        found = alike_kN.sort(dim=-1, descending=True, stable=True)
        near, closed = found.indices[:, :nearest], found.values[:, :nearest].isinf()
        weight_kN = alike_kN.zero_().scatter_(1, near, share_N[near].masked_fill(closed, 0))
        taken_KC[some] = (weight_kN @ rows_NC).masked_fill(~open_N[kept][:, None], 0)
    return (merged_KC.float() + taken_KC).to(merged_KC.dtype)


PRUMERGE = TowerRank(
    "prumerge",
    "what the vision tower's class token attends to most; each takes in the 32 with the likest keys",
    most_attended,
    merge=with_nearest,
)
PRUMERGE_PLUS = TowerRank(
    "prumerge_plus",
    "a quarter as `prumerge`, the others evenly spaced; each takes in the 32 with the likest keys",
    attended_then_spaced,
    nested=False,
    merge=with_nearest,
)
