"""Tokens far from each other: greedy farthest-first over the embeddings that enter the decoder.

The idea of "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (section 3.2),
with its distance (one minus the cosine) and its first token (the one whose nearest other is farthest).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks.base import PictureRank

if TYPE_CHECKING:
    import torch


def distances(embeddings_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, N] one minus the cosine, in float32; and [N] how far the nearest other token is."""
    tokens_NH = embeddings_NH.float()
    tokens_NH = tokens_NH / tokens_NH.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    distance_NN = 1 - tokens_NH @ tokens_NH.T
    return distance_NN, distance_NN.clone().fill_diagonal_(float("inf")).min(0).values


def farthest_first(embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices of the tokens, each the farthest from all before it; waits for nothing.

    Of equals, the first token wins.
    """
    distance_NN, apart_N = distances(embeddings_NH)
    chosen_K: torch.Tensor = distance_NN.new_zeros(keep).long()
    for index in range(keep):
        best = apart_N.argmax(0, keepdim=True)
        chosen_K[index : index + 1] = best
        row_N = distance_NN.index_select(0, best)[0]
        apart_N = row_N if index == 0 else apart_N.minimum(row_N)
        # However alike all others are, what is chosen is never the farthest again.
        apart_N = apart_N.index_fill(0, best, -float("inf"))
    return chosen_K


DIVERSITY = PictureRank("diversity", "far from each other in embedding", farthest_first)
