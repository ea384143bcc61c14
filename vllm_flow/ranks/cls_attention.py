"""Tokens that the vision tower's class token attends to: FasterVLM's choice.

"[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster"
(arXiv 2412.01818v1), section 3.2, in the layer that its released code takes: the one whose output the
decoder gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks.base import TowerRank

if TYPE_CHECKING:
    import torch


def most_attended(scores_N: torch.Tensor, embeddings_NH: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices of the tokens by descending score; of equals, the first token wins."""
    return scores_N.argsort(descending=True, stable=True)[:keep]


CLS_ATTENTION = TowerRank(
    "cls_attention", "what the vision tower's class token attends to most", most_attended
)
"""Sees the picture alone: whatever the question and whatever is before the picture, the same tokens."""
