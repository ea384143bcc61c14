"""Pictures that are encoded with what their patches receive: they have a name of their own.

What a picture's patches receive takes as many products as one of the tower's layers takes to attend, so it is
worked out only while requests that rank by it are there. Another request may have had the same picture encoded without;
vLLM finds a picture that is encoded by its name, so the front end gives it another one in such requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_flow.engine.requests import EVICTABLE_MODALITIES
from vllm_flow.ranks import RANKS, TowerRank, TowerScore

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from vllm_flow.layout import TokenLayout

PIXELS = ("pixel_values", "pixel_values_flat")
"""What the models of which a tower is read (`tower_views`) call the pixels of pictures; those of videos have others."""
NAME_MARK = "flow-received:"
"""What the name of such a picture begins with."""


def ranks_by_received(layout: TokenLayout) -> bool:
    """Whether a request chooses by what patches receive."""
    ranks = (RANKS[choice.rank] for stage in layout.stages for choice in stage.choices)
    return any(isinstance(rank, TowerRank) and rank.score == TowerScore.RECEIVED for rank in ranks)


def named(
    features: Iterable[MultiModalFeatureSpec], layout: TokenLayout
) -> list[MultiModalFeatureSpec]:
    """A request's inputs, its pictures under the names that its layout asks for."""
    if not ranks_by_received(layout):
        return list(features)
    return [_named(one) if one.modality in EVICTABLE_MODALITIES else one for one in features]


def _named(picture: MultiModalFeatureSpec) -> MultiModalFeatureSpec:
    if picture.identifier.startswith(NAME_MARK):
        return picture
    # Its pixels, which are cached as well, are those of any request.
    return replace(
        picture,
        identifier=NAME_MARK + picture.identifier,
        mm_hash=picture.mm_hash or picture.identifier,
    )
