"""Whether an engine can have a policy's ranks: what they look at must be there to be read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_flow.engine import obstacles, states
from vllm_flow.engine.obstacles import Obstacle
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.ranks import (
    RANKS,
    AttentionRank,
    HiddenRank,
    TowerRank,
    UnrotatedRank,
    after_layer,
)

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

PIXELS = "pixel_values"
"""What the models of which a tower is read (`tower_scores`) call the pixels of a picture."""
ANOTHER_BACKEND = "or have the server started with another attention backend (--attention-backend)."
LOOKS: tuple[tuple[type, str], ...] = (
    (AttentionRank, obstacles.RANKS),
    (HiddenRank, obstacles.HIDDEN),
    (UnrotatedRank, obstacles.UNROTATED),
    (TowerRank, obstacles.TOWER),
)
"""Kinds of ranks by what may keep an engine from them."""


def check(
    policy: FlowPolicy,
    layout: TokenLayout,
    settings: FlowSettings,
    pictures: Iterable[MultiModalFeatureSpec] = (),
) -> None:
    """Refuse ranks that this engine cannot have, or not of these pictures.

    Raises:
        Obstacle: names one of them, the reason, and those that it can have.
    """
    _check_states(layout, settings)
    _check_keys(policy, settings)
    _check_workers(layout, settings)
    if settings.mm_embeds:
        _check_encoded(layout, settings, pictures)


def by_keys(policy: FlowPolicy) -> str | None:
    """A rank of the policy's that reads keys, None if there is none."""
    return next((n for n in sorted(policy.ranks) if isinstance(RANKS[n], AttentionRank)), None)


def _check_keys(policy: FlowPolicy, settings: FlowSettings) -> None:
    rank = by_keys(policy) if settings.quantised_keys else None
    if rank is not None:
        raise Obstacle(
            f"rank {rank!r} reads keys, which this engine stores in eight bits; rank by "
            f"{_before_layers(settings)}, or have the server started without kv_cache_dtype."
        )


def _check_states(layout: TokenLayout, settings: FlowSettings) -> None:
    """What layers without keys cannot do; see `states`."""
    asked = {
        stage.layer: choice.rank
        for stage in layout.stages
        for choice in stage.choices
        if after_layer(RANKS[choice.rank])
    }
    stage = states.unranked_stage(settings.attending, sorted(asked))
    if stage is not None:
        raise Obstacle(
            f"{asked[stage]!r} looks at keys of layer {stage - 1}, which has a state in their place; "
            f"begin the stage at one of the layers "
            f"{states.right_behind(settings.attending)}, or rank by {_before_layers(settings)}."
        )


def _check_workers(layout: TokenLayout, settings: FlowSettings) -> None:
    """What the workers cannot read would end the engine."""
    for kind, obstacle in LOOKS:
        name = _asked(layout, kind)
        reason = settings.obstacles.get(obstacle)
        if name is not None and reason is not None:
            raise Obstacle(f"{name!r} {_unread(obstacle, reason, settings)}")


def _check_encoded(
    layout: TokenLayout, settings: FlowSettings, pictures: Iterable[MultiModalFeatureSpec]
) -> None:
    """A picture that comes as embeddings has been through no tower of this engine."""
    name = _asked(layout, TowerRank)
    if name is not None and not all(_has_pixels(picture.data) for picture in pictures):
        raise Obstacle(
            f"{name!r} reads the attention of the vision tower's class token, and a picture of this prompt came as "
            f"embeddings, which no tower of this engine has seen; send its pixels, or rank by "
            f"{_possible(settings, tower=False)}."
        )


def _asked(layout: TokenLayout, kind: type) -> str | None:
    """The first rank of a kind, by name, that any stage chooses by."""
    asked = sorted({choice.rank for stage in layout.stages for choice in stage.choices})
    return next((name for name in asked if isinstance(RANKS[name], kind)), None)


def _has_pixels(item: Any) -> bool:
    """Whether the tower is given what a picture's item holds; not known of one that lies elsewhere."""
    return item is not None and PIXELS in item


def _unread(obstacle: str, reason: str, settings: FlowSettings) -> str:
    """What a rank would look at, why it cannot, and the remedy."""
    if obstacle == obstacles.RANKS:
        return (
            f"reads keys from this engine's KV cache, which cannot be done: {reason}; "
            f"rank by {_before_layers(settings)}, {ANOTHER_BACKEND}"
        )
    if obstacle == obstacles.TOWER:
        return (
            f"reads the attention of the vision tower's class token, {reason}; rank by "
            f"{_possible(settings)}."
        )
    return (
        f"looks into the layers of this model, which cannot be done: {reason}; "
        f"rank by {_before_layers(settings)}."
    )


def _possible(settings: FlowSettings, *, behind_layers: bool = True, tower: bool = True) -> str:
    """The ranks that the engine can have, for messages."""
    refused = tuple(kind for kind, name in LOOKS if name in settings.obstacles)
    refused += () if tower else (TowerRank,)
    found = (
        repr(name)
        for name, rank in RANKS.items()
        if not isinstance(rank, refused) and (behind_layers or not after_layer(rank))
    )
    return " or ".join(found)


def _before_layers(settings: FlowSettings) -> str:
    """Those of them that look at no layer."""
    return _possible(settings, behind_layers=False)
