"""Kinds of ranks that look at many rows of a layer: the image's own, and the question's.

The *question* is the prompt's text behind its last image, to the end of the prompt, the chat template's
included.

Legend: N tokens of an image that are left, Q rows of the question, H width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vllm_flow.ranks.base import AttentionRank, Needs
from vllm_flow.spans import IntArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuestionRank(AttentionRank):
    """Chooses the tokens that rows of the question attend to most, on average over rows and heads.

    All rows that count must be at hand at once, so it cannot choose after the prefill.
    """

    needs: Needs = Needs.PROMPT
    weights: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """``weights(embeddings of the whole image [N, H], of the question [Q, H])``: [Q] how much each row of
    the question counts. Without it all count alike."""

    @property
    def late(self) -> bool:
        """Of a prompt computed in parts, only the last part's rows can be asked at its end."""
        return False


@dataclass(frozen=True)
class HiddenRank:
    """Chooses by hidden states where the stage begins, and by how large the keys of the layer before are."""

    name: str
    title: str
    choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    """``choose(states [N, H], keys [N], states of the question [Q, H], its keys [Q], K)``: [N] which K
    tokens stay. States have passed the decoder's final norm; of a key there is its L1 norm over all heads,
    the sum of its absolute values (or any multiple of that, the same for all)."""
    reads_layer: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs.PROMPT
    late: ClassVar[bool] = False


@dataclass(frozen=True)
class UnrotatedRank:
    """Chooses the tokens that the prompt's last one would attend to most if nothing told positions.

    Queries and keys are those of the layer before the stage's, before their rotary embedding; probabilities
    are over the image's tokens alone, averaged over heads.
    """

    name: str
    title: str
    sample: Callable[[int], IntArray] | None = None
    """``sample(tokens of the whole image)``: indices of those that come before all others, whatever attends
    to them; among themselves they are ranked like the others."""
    reads_layer: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs.PROMPT
    late: ClassVar[bool] = False
