"""Tokens unlike a few pivots: what is left out is what others say already.

"Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (arXiv
2502.11494), with what its released code compares: pivots are the tokens with the largest keys, of
the image and of the question; every pivot in turn keeps as many of the tokens that are least like it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_flow.ranks import unlike
from vllm_flow.ranks.rows import HiddenRank

if TYPE_CHECKING:
    import torch

PIVOTS = 4
"""Of the image, and as many of the question: the released code's numbers."""


def unlike_pivots(
    states_NH: torch.Tensor,
    keys_N: torch.Tensor,
    states_QH: torch.Tensor,
    keys_Q: torch.Tensor,
    keep: int,
) -> torch.Tensor:
    """[N] which ``keep`` tokens stay: the image's pivots, and the least like them and the question's.

    Pivots keep as many each, the first ones one more where that does not divide; the image's come before the
    question's, larger keys before smaller ones. Of equals, the first token wins. Waits for nothing.
    """
    own = keys_N.argsort(descending=True, stable=True)[: min(PIVOTS, keep)]
    asking = keys_Q.argsort(descending=True, stable=True)[:PIVOTS]
    tokens_NH, question_QH = unlike.unit(states_NH), unlike.unit(states_QH)
    alike = [*(tokens_NH[own] @ tokens_NH.T), *(question_QH[asking] @ tokens_NH.T)]
    stays_N = keys_N.new_zeros(len(keys_N)).bool().index_fill(0, own, True)
    each, more = divmod(keep - len(own), len(alike))
    for index, alike_N in enumerate(alike):
        order = alike_N.masked_fill(stays_N, float("inf")).argsort(stable=True)
        stays_N = stays_N.index_fill(0, order[: each + (index < more)], True)
    return stays_N


DART = HiddenRank("dart", "tokens least like a few pivots with large keys", unlike_pivots)
