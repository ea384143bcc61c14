"""Tokens that those rows of the question attend to which the picture has to do with: SparseVLM's choice.

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417),
section 3.2: the relevance of each token of the question to the picture says who rates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks.rows import QuestionRank

if TYPE_CHECKING:
    import torch


def raters(image_NH: torch.Tensor, question_QH: torch.Tensor) -> torch.Tensor:
    """[Q] 1 for the tokens of the question whose relevance is above its mean, 0 for others.

    The relevance: dot products of embeddings, softmax over the question, averaged over the image. Where
    all are as relevant as each other, all rate.
    """
    relevance_Q = (image_NH.float() @ question_QH.float().T).softmax(-1).mean(0)
    least = relevance_Q.mean().minimum(relevance_Q.max())  # a mean may round up
    return (relevance_Q >= least).float()


RATERS = QuestionRank(
    "raters",
    "what those tokens of the question attend to most that have to do with the picture",
    weights=raters,
)
