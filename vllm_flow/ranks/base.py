"""Kinds of ranks, told apart by what they look at; each says what that costs a request. More: `rows`.

Two of them may *merge*, too: what stays of a picture takes in what goes, before the decoder's first layer.

Legend: M tokens of an image that are left, N of the whole image, K of them kept, H width of the decoder's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from vllm_flow.spans import IntArray

if TYPE_CHECKING:
    import torch

    from vllm_flow.ranks.rows import HiddenRank, UnrotatedRank


class Needs(Enum):
    """What must be computed in one step, since the choice looks at all of it."""

    NOTHING = "nothing"
    IMAGE = "image"
    PROMPT = "prompt"
    """From the first image to the end of the prompt."""


@dataclass(frozen=True)
class PositionRank:
    """Chooses by place alone, on the host."""

    name: str
    title: str
    choose: Callable[[int, int, Draw], IntArray]
    """``choose(M, K, draw)``: [K] indices into the M tokens, ascending."""
    draws: bool = False
    """Whether the request's seed matters."""
    reads_layer: ClassVar[bool] = False
    """Whether it looks at what the layer before its stage has made, so that there must be one."""
    needs: ClassVar[Needs] = Needs.NOTHING
    late: ClassVar[bool] = True
    """Whether it can choose when the whole prompt is computed, however that was done."""


@dataclass(frozen=True)
class PictureRank:
    """Chooses by the image's embeddings as they enter the decoder, whatever else the prompt says."""

    name: str
    title: str
    order: Callable[[torch.Tensor, int], torch.Tensor]
    """``order(embeddings [N, H], K)``: [K] indices of the whole image's tokens, best first. Nested: the
    order of fewer is the beginning of the order of more."""
    merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """``merge(embeddings [N, H], kept [K])``: [K, H] what the kept tokens' embeddings become, in the embeddings' dtype;
    ``kept`` is in the order that `order` gave. None: what they were. A stage with a rank that merges begins at layer
    0."""
    nested: ClassVar[bool] = True
    reads_layer: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs.IMAGE
    late: ClassVar[bool] = False


class TowerScore(Enum):
    """Attention probability in the vision tower's layer whose output the decoder gets, averaged over heads."""

    CLASS = "attention of the vision tower's class token"
    """What the class token gives a patch."""
    RECEIVED = "attention among the vision tower's patches"
    """What a patch is given, averaged over the patches of its picture."""


class TowerRows(Enum):
    """What else ranks that merge are handed of a picture's tokens; kept with what the picture was encoded to."""

    KEYS = "keys"
    """[N, D] of the layer that scores, averaged over heads, in float32; a token of several patches has their mean."""
    FEATURES = "features"
    """[N, C] what the projector is given, where it makes each token of one row."""


class TowerTiles(Enum):
    """What else ranks that share a budget out among tiles are handed of a picture's tokens."""

    EARLY = "early"
    """[N] what the class token gives in the tower's first layer."""
    TILE = "tile"
    """[N] index of the tile that a token is of; -1 of the ends of rows."""


@dataclass(frozen=True)
class TowerRank:
    """Chooses by a score that the vision tower gave each token while the picture was encoded."""

    name: str
    title: str
    order: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    """``order(scores [N], embeddings [N, H], K)``: [K] indices of the whole image's tokens, best first."""
    nested: bool = True
    """Whether the order of fewer is the beginning of the order of more. If not, the rank is refused but at an
    image's first stage, where all of its tokens are there to be chosen."""
    score: TowerScore = TowerScore.CLASS
    merge: (
        Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None
    ) = None
    """``merge(rows [N, C], kept [K], scores [N], keys [N, D])``: [K, C] what the kept tokens' rows become, in the rows'
    dtype. Rows are what the tower hands to the projector, through which what they become goes again; where that makes
    one token of several rows, they are the embeddings. Of a token with infinite score (the end of a row of patches)
    row and key are zero. Otherwise as in :class:`PictureRank`."""
    reads_layer: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs.IMAGE
    late: ClassVar[bool] = False


@dataclass(frozen=True)
class TileRank(TowerRank):
    """Chooses by what the class token gives in two layers of the tower, and by which tile a token is of. Merges
    nothing."""

    order: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]  # type: ignore[assignment]
    """``order(scores [N], early [N], tiles [N], K)``: [K] indices of the whole image's tokens, best first. Early: the
    scores of the tower's first layer. Tiles, int64: 0 the whole picture, then its tiles in the order in which the tower
    sees them; -1 of what ends a row of patches, whose scores are infinite."""


@dataclass(frozen=True)
class FrameRank(PictureRank):
    """Chooses among the tokens of a video by their embeddings, and by which frame a token is of. Merges nothing."""

    order: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]  # type: ignore[assignment]
    """``order(embeddings [N, H], frames [N], K)``: [K] indices of the whole video's tokens, best first; nested as in
    :class:`PictureRank`. Frames, int64: from 0, each with as many tokens, one frame after the other (two of the video's
    own where a model sees them together); -1 of what is no frame's, behind them."""


@dataclass(frozen=True)
class AttentionRank:
    """Chooses the tokens that one row attends to most, in the layer before the stage's.

    The score is the attention probability averaged over heads.
    """

    name: str
    title: str
    needs: Needs
    """IMAGE: the row is the image's last token that is left. PROMPT: it is the prompt's last token."""
    reads_layer: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    @property
    def late(self) -> bool:
        """The prompt's last token is computed with the last step of any prompt, and sees all of it."""
        return self.needs == Needs.PROMPT


Rank: TypeAlias = (
    "PositionRank | PictureRank | TowerRank | AttentionRank | HiddenRank | UnrotatedRank"
)


def merges(rank: Rank) -> bool:
    """Whether tokens that stay take in those that go."""
    return isinstance(rank, PictureRank | TowerRank) and rank.merge is not None


@dataclass(frozen=True, slots=True)
class Draw:
    """What a rank that draws must know to draw the same in every process and step."""

    seed: int
    """The request's, ``flow_seed``."""
    image: int
    """Index of the image in the prompt."""
    layer: int
    """The stage's."""
