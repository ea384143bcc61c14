"""Whether an engine can have a policy, whatever the prompt: one set of rules for a client's and for an operator's.

A client's request is refused by any of them. An operator's policy is refused at start-up by what the configuration
shows, and the log says what the workers find later (`default_policies`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vllm_flow import rank_trials
from vllm_flow.engine import obstacles
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_keys import WHEN_KEY
from vllm_flow.ranks import (
    RANKS,
    AttentionRank,
    FrameRank,
    HiddenRank,
    Rank,
    TileRank,
    TowerRank,
    TowerScore,
    UnrotatedRank,
    merges,
)

ANOTHER_BACKEND = "or have the server started with another attention backend (--attention-backend)."


@dataclass(frozen=True)
class Some:
    """Some of the ranks."""

    kind: type = object
    score: TowerScore | None = None
    """Of those that look inside the tower."""
    merging: bool = False
    """Whether these are only those that merge."""

    def __contains__(self, rank: Rank) -> bool:
        return (
            isinstance(rank, self.kind)
            and (self.score is None or getattr(rank, "score", None) == self.score)
            and (merges(rank) or not self.merging)
        )

    def first(self, names: Iterable[str]) -> str | None:
        """The first of some ranks by name that is one of these."""
        return next((name for name in sorted(names) if RANKS[name] in self), None)


LOOKS: Mapping[str, Some] = {
    obstacles.RANKS: Some(AttentionRank),
    obstacles.HIDDEN: Some(HiddenRank),
    obstacles.UNROTATED: Some(UnrotatedRank),
    obstacles.TOWER: Some(TowerRank, TowerScore.CLASS),
    obstacles.RECEIVED: Some(TowerRank, TowerScore.RECEIVED),
    obstacles.TILES: Some(TileRank),
    obstacles.FRAMES: Some(FrameRank),
    obstacles.MERGING: Some(merging=True),
}
"""What may keep an engine from ranks -> which ones."""


@dataclass(frozen=True)
class Unfit:
    """Why no request of an engine can have a policy."""

    sentence: str
    """What is at fault, and the remedy."""
    key: str | None = None
    """A request's key that is at fault; None for those that say which tokens stay."""


Rule: TypeAlias = Callable[[FlowPolicy, EngineFacts], Unfit | None]


def unfit(
    policy: FlowPolicy, engine: EngineFacts, rules: Sequence[Rule] | None = None
) -> Iterator[Unfit]:
    """All that is in a policy's way in this engine, each with its remedy; nothing where none is.

    Args:
        rules: :data:`CONFIGURED`, :data:`TOLD`, or both (None).
    """
    for rule in (*CONFIGURED, *TOLD) if rules is None else rules:
        found = rule(policy, engine)
        if found is not None:
            yield found


def possible(
    engine: EngineFacts,
    *,
    reading_layers: bool = True,
    reading_tower: bool = True,
    of_frames: bool = True,
) -> str:
    """The ranks that the engine can have, to be read."""
    refused = [found for name, found in LOOKS.items() if name in engine.obstacles]
    refused += [] if reading_tower else [Some(TowerRank)]
    refused += [] if of_frames else [Some(FrameRank)]
    refused += [Some(AttentionRank)] if engine.quantised_keys else []
    found = (
        repr(name)
        for name, rank in RANKS.usable().items()
        if obstacles.ADDED + name not in engine.obstacles
        and not any(rank in some for some in refused)
        # What merges is at layer 0, and never in the place of a rank that has a layer before it.
        and (reading_layers or not (rank.reads_layer or merges(rank)))
        and not (isinstance(rank, HiddenRank) and engine.pipeline)
    )
    return " or ".join(found)


def _added(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    """Other packages' ranks are not relied on before they were tried."""
    for name in sorted(policy.ranks & set(RANKS.added)):
        try:
            rank_trials.check(RANKS[name])
        except ValueError as error:
            return Unfit(f"{error}; mend {RANKS.added[name][0]}.")
    return None


def _late_beside_states(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    if policy.when != "decode" or not (engine.attending and engine.keep_states):
        return None
    return Unfit(
        "images cannot leave this model after the prefill: by then the states of its other layers have taken "
        f"in the whole image; leave out {WHEN_KEY}.",
        WHEN_KEY,
    )


def _late_beside_a_connector(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    if policy.when != "decode" or not engine.connected:
        return None
    return Unfit(
        "this engine has a KV connector, which may fill blocks that were given back before what stays after the "
        f"prefill is copied out of them; leave out {WHEN_KEY}, or have the server started without "
        "kv_transfer_config.",
        WHEN_KEY,
    )


def _behind_layers_without_keys(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    if not engine.attending:
        return None
    for stage in sorted(
        {stage for stages in policy.images for stage in stages}, key=lambda stage: stage.layer
    ):
        if stage.rank is None or not RANKS[stage.rank].reads_layer:
            continue
        if stage.layer - 1 not in engine.attending:
            behind = ", ".join(str(layer + 1) for layer in engine.attending)
            return Unfit(
                f"{stage.rank!r} looks at keys of layer {stage.layer - 1}, which has none; begin the stage at one "
                f"of the layers {behind}, or rank by {_reading_no_layer(engine)}."
            )
    return None


def _normed_on_one_stage(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    rank = next((n for n in sorted(policy.ranks) if isinstance(RANKS[n], HiddenRank)), None)
    if rank is None or not engine.pipeline:
        return None
    return Unfit(
        f"rank {rank!r} looks at hidden states through the decoder's final norm, which only the last stage of this "
        f"engine's pipeline has; rank by {possible(engine)}, or have the server started with "
        "pipeline_parallel_size=1."
    )


def _keys_in_eight_bits(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    rank = next((n for n in sorted(policy.ranks) if isinstance(RANKS[n], AttentionRank)), None)
    if rank is None or not engine.quantised_keys:
        return None
    return Unfit(
        f"rank {rank!r} reads keys, which this engine stores in eight bits; rank by "
        f"{_reading_no_layer(engine)}, or have the server started without kv_cache_dtype."
    )


def _unmoved(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    reason = engine.obstacles.get(obstacles.LATE)
    if policy.when != "decode" or reason is None:
        return None
    return Unfit(
        f"what stays after the prefill cannot be moved in this engine's KV cache: {reason}; leave out "
        f"{WHEN_KEY}, {ANOTHER_BACKEND}",
        WHEN_KEY,
    )


def _unread(policy: FlowPolicy, engine: EngineFacts) -> Unfit | None:
    """What the workers cannot read would end the engine."""
    for obstacle, some in LOOKS.items():
        name = some.first(policy.ranks)
        reason = engine.obstacles.get(obstacle)
        if name is not None and reason is not None:
            return Unfit(f"{name!r} {_reads(obstacle, reason, engine)}")
    for name in sorted(policy.ranks):
        reason = engine.obstacles.get(obstacles.ADDED + name)
        if reason is not None:
            return Unfit(
                f"{name!r} is not the same everywhere in this engine: {reason}; rank by {possible(engine)}."
            )
    return None


CONFIGURED: tuple[Rule, ...] = (
    *(_added, _late_beside_states, _late_beside_a_connector),
    *(_behind_layers_without_keys, _keys_in_eight_bits, _normed_on_one_stage),
)
"""What is known as soon as the engine is configured."""
TOLD: tuple[Rule, ...] = (_unmoved, _unread)
"""What its workers find once they have loaded the model."""


def _reads(obstacle: str, reason: str, engine: EngineFacts) -> str:
    """What a rank would look at, why it cannot, and the remedy."""
    if obstacle == obstacles.RANKS:
        return (
            f"reads keys from this engine's KV cache, which cannot be done: {reason}; "
            f"rank by {_reading_no_layer(engine)}, {ANOTHER_BACKEND}"
        )
    if obstacle == obstacles.MERGING:
        return f"merges embeddings, {reason}; rank by {possible(engine)}."
    if obstacle == obstacles.TILES:
        return f"goes by the tiles of a picture, {reason}; rank by {possible(engine)}."
    if obstacle == obstacles.FRAMES:
        return f"goes by the frames of a video, {reason}; rank by {possible(engine)}."
    score = LOOKS[obstacle].score
    if score is not None:
        return f"reads the {score.value}, {reason}; rank by {possible(engine)}."
    return (
        f"looks into the layers of this model, which cannot be done: {reason}; "
        f"rank by {_reading_no_layer(engine)}."
    )


def _reading_no_layer(engine: EngineFacts) -> str:
    return possible(engine, reading_layers=False)
