"""Tokens that cover the picture, weighed by what attends to them: SCOPE's choice.

"SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs" (arXiv 2510.24214), as its released
code does it, with the exponent 1 of its script. A token is covered as far as the likest one that stays is like it. One
token after the other stays: the one that adds most to what is covered in all, times its own attention. But how alike
two tokens are is told by the embeddings that enter the decoder, not by the tower's features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks import unlike
from vllm_flow.ranks.base import TowerRank

if TYPE_CHECKING:
    import torch


def covering(scores_N: torch.Tensor, embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices of the tokens, in the order in which they are chosen; of equals, the first.

    Of more than `unlike.AT_ONCE` tokens every nth counts as one to be covered, so that no more pairs are held than
    that many have. The ends of rows of patches, whose score is infinite, come first; they cover nothing and are
    covered by nothing.
    """
    total, pairs = len(scores_N), unlike.AT_ONCE * unlike.AT_ONCE
    ends_N = scores_N.isposinf()
    tokens_NH = unlike.unit(embeddings_NH).masked_fill_(ends_N[:, None], 0)
    alike_RN = tokens_NH[:: -(-total * total // pairs)] @ tokens_NH.T
    weight_N = scores_N.float().masked_fill(ends_N, 0)
    # What a step adds is summed in parts, each an eighth of the pairs that may be held.
    rows = max(1, pairs // 8 // total)
    parts = [alike_RN[first : first + rows] for first in range(0, len(alike_RN), rows)]
    covered = [part.new_zeros(len(part), 1) for part in parts]
    # Ends first, in their order; what has been chosen, never again.
    bias_N = weight_N.new_zeros(total).masked_fill(ends_N, float("inf"))
    chosen_K: torch.Tensor = scores_N.new_zeros(keep).long()
    for index in range(keep):
        gain_N = sum(
            (part - done).clamp_min_(0).sum(0) for part, done in zip(parts, covered, strict=True)
        )
        best = (gain_N * weight_N + bias_N).argmax(0, keepdim=True)
        chosen_K[index : index + 1] = best
        covered = [
            done.maximum(part.index_select(1, best))
            for part, done in zip(parts, covered, strict=True)
        ]
        bias_N = bias_N.index_fill(0, best, -float("inf"))
    return chosen_K


SCOPE = TowerRank(
    "scope",
    "tokens that cover the picture, as far as others are like them, where the vision tower's class token attends",
    covering,
)
