"""Tokens far from each other: greedy farthest-first over the embeddings that enter the decoder.

The idea of "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (section 3.2),
with its distance (one minus the cosine) and its first token (the one whose nearest other is farthest).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks import unlike
from vllm_flow.ranks.base import PictureRank

if TYPE_CHECKING:
    import torch


def farthest_first(embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices of the tokens, each the farthest from all before it; waits for nothing.

    Of equals, the first token wins. All distances are held of a picture's tokens; of more, of a long video, those
    from one token at a time.
    """
    tokens_NH = unlike.unit(embeddings_NH)
    distance_NN = None
    if len(tokens_NH) <= unlike.AT_ONCE:
        distance_NN, apart_N = unlike.distances(tokens_NH)
    else:
        apart_N = unlike.nearest_other(tokens_NH)
    chosen_K: torch.Tensor = tokens_NH.new_zeros(keep).long()
    for index in range(keep):
        best = apart_N.argmax(0, keepdim=True)
        chosen_K[index : index + 1] = best
        row_N = (
            unlike.distances_from(tokens_NH, best)
            if distance_NN is None
            else distance_NN.index_select(0, best)[0]
        )
        apart_N = row_N if index == 0 else apart_N.minimum(row_N)
        # However alike all others are, what is chosen is never the farthest again.
        apart_N = apart_N.index_fill(0, best, -float("inf"))
    return chosen_K


DIVERSITY = PictureRank(
    "diversity", "tokens whose embeddings are far from each other", farthest_first
)
