"""Checks that an engine can have a policy's ranks: what they look at must be there to be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_flow import rank_trials
from vllm_flow.engine import obstacles, states
from vllm_flow.engine.obstacles import Misfit, Obstacle
from vllm_flow.engine.scored_pictures import PIXELS
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.ranks import (
    RANKS,
    AttentionRank,
    HiddenRank,
    Rank,
    TowerRank,
    TowerScore,
    UnrotatedRank,
    after_layer,
)

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

ANOTHER_BACKEND = "or have the server started with another attention backend (--attention-backend)."
LOOKS: Mapping[str, tuple[type, TowerScore | None]] = {
    obstacles.RANKS: (AttentionRank, None),
    obstacles.HIDDEN: (HiddenRank, None),
    obstacles.UNROTATED: (UnrotatedRank, None),
    obstacles.TOWER: (TowerRank, TowerScore.CLASS),
    obstacles.RECEIVED: (TowerRank, TowerScore.RECEIVED),
}
"""What may keep an engine from ranks -> their kind, and their score if they look inside the tower."""


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
    tower = min((n for n in _chosen_by(layout) if isinstance(RANKS[n], TowerRank)), default=None)
    if tower is not None:
        _check_encoded(tower, settings, pictures)


def check_added(policy: FlowPolicy, settings: FlowSettings) -> None:
    """Refuse ranks of other packages that this engine's workers do not have, or that do not keep what they promise.

    Raises:
        Obstacle: names one of them and the reason.
    """
    reason = added_fault(policy) or unread(policy.ranks & set(RANKS.added), settings)
    if reason is not None:
        raise Obstacle(Misfit.ENGINE, reason)


def added_fault(policy: FlowPolicy) -> str | None:
    """What a policy's ranks of other packages do not keep of what they promise; None where they keep all."""
    for name in sorted(policy.ranks & set(RANKS.added)):
        try:
            rank_trials.check(RANKS[name])
        except ValueError as error:
            return f"{error}; mend {RANKS.added[name][0]}."
    return None


def by_keys(policy: FlowPolicy) -> str | None:
    """A rank of the policy's that reads keys, None if there is none."""
    return next((n for n in sorted(policy.ranks) if isinstance(RANKS[n], AttentionRank)), None)


def _check_keys(policy: FlowPolicy, settings: FlowSettings) -> None:
    rank = by_keys(policy) if settings.quantised_keys else None
    if rank is not None:
        raise Obstacle(
            Misfit.ENGINE,
            f"rank {rank!r} reads keys, which this engine stores in eight bits; rank by "
            f"{_before_layers(settings)}, or have the server started without kv_cache_dtype.",
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
            Misfit.ENGINE,
            f"{asked[stage]!r} looks at keys of layer {stage - 1}, which has none; "
            f"begin the stage at one of the layers "
            f"{states.right_behind(settings.attending)}, or rank by {_before_layers(settings)}.",
        )


def unread(ranks: Collection[str], settings: FlowSettings) -> str | None:
    """Of some ranks one that this engine's workers cannot have, why, and those that they can; None if all."""
    for obstacle, (kind, score) in LOOKS.items():
        name = next((rank for rank in sorted(ranks) if _is_kind(RANKS[rank], kind, score)), None)
        reason = settings.obstacles.get(obstacle)
        if name is not None and reason is not None:
            return f"{name!r} {_unread(obstacle, reason, settings)}"
    for name in sorted(ranks):
        reason = settings.obstacles.get(obstacles.ADDED + name)
        if reason is not None:
            return f"{name!r} is not the same everywhere in this engine: {reason}; rank by {_possible(settings)}."
    return None


def _check_workers(layout: TokenLayout, settings: FlowSettings) -> None:
    """What the workers cannot read would end the engine."""
    reason = unread(_chosen_by(layout), settings)
    if reason is not None:
        raise Obstacle(Misfit.ENGINE, reason)


def _check_encoded(
    name: str, settings: FlowSettings, pictures: Iterable[MultiModalFeatureSpec]
) -> None:
    """What comes as embeddings has been through no tower of this engine; of a video's frames nobody knows.

    Args:
        name: of a rank that looks inside the tower.
    """
    reads = f"{name!r} reads the {RANKS[name].score.value}"
    remedy = f"rank by {_possible(settings, tower=False)}."
    for picture in pictures:
        if picture.modality == "video":
            raise Obstacle(
                Misfit.VIDEO,
                f"{reads}, and nobody has tested how those of a video's frames compare; send frames as single "
                f"pictures, or {remedy}",
            )
        if settings.mm_embeds and not _has_pixels(picture.data):
            raise Obstacle(
                Misfit.EMBEDDINGS,
                f"{reads}, and a picture of this prompt came as embeddings, which no tower of this engine has "
                f"seen; send its pixels, or {remedy}",
            )


def _chosen_by(layout: TokenLayout) -> set[str]:
    """The ranks that any stage chooses by."""
    return {choice.rank for stage in layout.stages for choice in stage.choices}


def _is_kind(rank: Rank, kind: type, score: TowerScore | None) -> bool:
    return isinstance(rank, kind) and (score is None or getattr(rank, "score", None) == score)


def _has_pixels(item: Any) -> bool:
    """Whether the tower is given what a picture's item holds; not known of one that lies elsewhere."""
    return item is not None and any(name in item for name in PIXELS)


def _unread(obstacle: str, reason: str, settings: FlowSettings) -> str:
    """What a rank would look at, why it cannot, and the remedy."""
    if obstacle == obstacles.RANKS:
        return (
            f"reads keys from this engine's KV cache, which cannot be done: {reason}; "
            f"rank by {_before_layers(settings)}, {ANOTHER_BACKEND}"
        )
    score = LOOKS[obstacle][1]
    if score is not None:
        return f"reads the {score.value}, {reason}; rank by {_possible(settings)}."
    return (
        f"looks into the layers of this model, which cannot be done: {reason}; "
        f"rank by {_before_layers(settings)}."
    )


def _possible(settings: FlowSettings, *, behind_layers: bool = True, tower: bool = True) -> str:
    """The ranks that the engine can have, for messages."""
    refused = [found for name, found in LOOKS.items() if name in settings.obstacles]
    refused += [] if tower else [(TowerRank, None)]
    found = (
        repr(name)
        for name, rank in RANKS.usable().items()
        if obstacles.ADDED + name not in settings.obstacles
        and not any(_is_kind(rank, *kind) for kind in refused)
        and (behind_layers or not after_layer(rank))
    )
    return " or ".join(found)


def _before_layers(settings: FlowSettings) -> str:
    """Those of them that look at no layer."""
    return _possible(settings, behind_layers=False)
