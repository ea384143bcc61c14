"""Pictures that are encoded with what their patches receive, or with what merging needs: they have names of their own.

To compute what a picture's patches receive costs as much as the attention of one layer of the tower, and rows for
merging take memory beside the embeddings. So both are kept only for requests that ask for them. Another request may
have had the same picture encoded without. vLLM finds an encoded picture by its name, so in requests that need more the
front end gives the picture another name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_flow.engine.requests import EVICTABLE_MODALITIES
from vllm_flow.ranks import RANKS, Rank, TowerRank, TowerScore, merges

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from vllm_flow.layout import TokenLayout

PIXELS = ("pixel_values", "pixel_values_flat")
"""What models whose tower is read (`worker/tower/views`) call the pixels of pictures; those of videos have others."""
NAME_MARK = "flow-received:"
MERGING_MARK = "flow-merging:"
"""What the names of such pictures begin with; that of a picture of both kinds with both."""


def ranks_by_received(layout: TokenLayout) -> bool:
    """Whether a request chooses by what patches receive."""
    return any(
        isinstance(rank, TowerRank) and rank.score == TowerScore.RECEIVED for rank in _ranks(layout)
    )


def merges_in_tower(layout: TokenLayout) -> bool:
    """Whether a request merges rows by keys of the tower."""
    return any(isinstance(rank, TowerRank) and merges(rank) for rank in _ranks(layout))


def _ranks(layout: TokenLayout) -> Iterator[Rank]:
    return (RANKS[choice.rank] for stage in layout.stages for choice in stage.choices)


def _mark(layout: TokenLayout) -> str:
    return NAME_MARK * ranks_by_received(layout) + MERGING_MARK * merges_in_tower(layout)


def named(
    features: Iterable[MultiModalFeatureSpec], layout: TokenLayout
) -> list[MultiModalFeatureSpec]:
    """A request's inputs, its pictures under the names that its layout asks for."""
    mark = _mark(layout)
    if not mark:
        return list(features)
    return [_named(one, mark) if one.modality in EVICTABLE_MODALITIES else one for one in features]


def _named(picture: MultiModalFeatureSpec, mark: str) -> MultiModalFeatureSpec:
    if picture.identifier.startswith(mark):
        return picture
    # Its pixels, which are cached as well, are those of any request.
    return replace(
        picture,
        identifier=mark + picture.identifier,
        mm_hash=picture.mm_hash or picture.identifier,
    )
