"""Tokens that stand out, and evenly spaced ones that take in the rest: VisionZip's choice and merging.

"VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467), section 3, as its
released code does it for LLaVA. *Dominant* tokens, the paper's 54 of 64, are those of the highest scores; of the
others, in reading order, every nth is *contextual*. Each token that goes is assigned to the contextual one
whose key is most like its own, and their mean is added to that one's row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks import unlike
from vllm_flow.ranks.base import TowerRank, TowerScore

if TYPE_CHECKING:
    import torch

CONTEXTUAL, OF = 10, 64
"""Of what stays: 10 of 64 in the released README."""


def contextual_of(keep: int) -> int:
    """How many of the tokens that stay are contextual."""
    return keep * CONTEXTUAL // OF


def dominant_then_contextual(
    scores_N: torch.Tensor, embeddings_NH: torch.Tensor, keep: int
) -> torch.Tensor:
    """[keep] indices of the tokens: dominant ones by descending score, then contextual ones in reading order."""
    contextual = contextual_of(keep)
    order_N = scores_N.argsort(descending=True, stable=True)
    dominant, rest = order_N[: keep - contextual], order_N[keep - contextual :].sort().values
    step = max(1, len(rest) // max(1, contextual))
    found: torch.Tensor = order_N.new_empty(keep)
    found[: len(dominant)], found[len(dominant) :] = dominant, rest[::step][:contextual]
    return found


def into_contextual(
    rows_NC: torch.Tensor, kept_K: torch.Tensor, scores_N: torch.Tensor, keys_ND: torch.Tensor
) -> torch.Tensor:
    """[K, C] the dominant rows as they were; to each contextual one the mean of those assigned to it is added.

    Of keys that are equally like a token's own, the first one takes it in. The ends of rows of patches, whose score is
    infinite, take in nothing and are taken in by nothing.
    """
    merged_KC, contextual = rows_NC[kept_K], contextual_of(len(kept_K))
    if not contextual:
        return merged_KC
    first = len(kept_K) - contextual
    targets, open_N = kept_K[first:], scores_N.isfinite()
    unit_ND, assigned_N = unlike.unit(keys_ND), kept_K.new_empty(len(rows_NC))
    for some in unlike.row_blocks(len(rows_NC), contextual):
        alike = (unit_ND[some] @ unit_ND[targets].T).masked_fill(~open_N[targets], -float("inf"))
        assigned_N[some] = alike.argmax(-1)
    going_N = open_N.index_fill(0, kept_K, False) & open_N[targets][assigned_N]
    going_NC = rows_NC.float().masked_fill(~going_N[:, None], 0)
    place_T = targets.new_ones(contextual).cumsum(0) - 1
    # Sums by products and not by index_add_, which on CUDA adds in any order: workers would differ in the last bits.
    for some in unlike.row_blocks(contextual, len(rows_NC)):
        taken_TN = ((assigned_N == place_T[some][:, None]) & going_N).float()
        mean_TC = taken_TN @ going_NC / taken_TN.sum(1, keepdim=True).clamp_min(1)
        merged_KC[first:][some] = (rows_NC[targets[some]].float() + mean_TC).to(rows_NC.dtype)
    return merged_KC


VISIONZIP = TowerRank(
    "visionzip",
    "of 64, 54 that the vision tower's class token attends to most, and 10 evenly spaced, which take in the rest",
    dominant_then_contextual,
    nested=False,
    merge=into_contextual,
)
VISIONZIP_RECEIVED = TowerRank(
    "visionzip_received",
    "the same, by what the vision tower's patches attend to: for towers without a class token",
    dominant_then_contextual,
    nested=False,
    score=TowerScore.RECEIVED,
    merge=into_contextual,
)
