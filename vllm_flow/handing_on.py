"""What one stage of a pipeline tells the next about a step in which the device chooses what stays. Integers only.

A worker plans for all layers, so it knows how many rows of a step are alive in its first one, but not which, where
an earlier worker's device has chosen. Nor has it what ranks look at that the first worker alone is given, embeddings
and what the vision tower scored, nor the attention that earlier layers gave a prompt whose images leave after the
prefill. All of it is handed on in the step in which it comes into being, and both sides work out from the same plan
what that is and how long: nothing need be said about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias

from vllm_flow.ranks import RANKS, PictureRank, QuestionRank, TowerRank
from vllm_flow.rewriting import LateReading
from vllm_flow.step import Ranking, StepPlan

Key: TypeAlias = tuple[int | str, ...]


class What(Enum):
    """Kinds of what is handed on."""

    ROWS = "rows"
    """Rows of the step that are alive in the next stage's first layer."""
    ORDER = "order"
    """Tokens of an image, best first, by what the first stage alone is given of it."""
    WEIGHTS = "weights"
    """How much each row of a question counts."""
    MASS = "mass"
    """What the last row of a prompt gave each of its tokens."""


class Part(NamedTuple):
    """So many numbers of one kind."""

    what: What
    key: Key
    """Whose: :attr:`vllm_flow.step.Ranking.key` of an order or of weights; request and layer of a mass."""
    length: int


class Handing(NamedTuple):
    """What a worker is told of a step's choices and what it tells; nothing where it has all layers."""

    told: tuple[Part, ...] = ()
    """By the stage before."""
    tells: tuple[Part, ...] = ()
    """The stage behind."""
    looks: tuple[Ranking, ...] = ()
    """Choices of later stages, whose images and questions the first one looks at for them."""

    def __bool__(self) -> bool:
        return any(self)


NOTHING = Handing()


def handing(
    plan: StepPlan | None,
    readings: Sequence[LateReading],
    request_ids: Sequence[str],
    layers: range,
    num_layers: int,
) -> Handing:
    """What the worker of some layers is told, and tells.

    Args:
        plan: the step's, of all layers.
        readings: the step's, likewise.
        request_ids: of the batch, in its order.
        num_layers: of all workers.
    """
    if len(layers) == num_layers:
        return NOTHING
    first, last = layers.start == 0, layers.stop == num_layers
    return Handing(
        () if first else tuple(crossing(plan, readings, request_ids, layers.start)),
        () if last else tuple(crossing(plan, readings, request_ids, layers.stop)),
        tuple(ranking for ranking, _ in _looked_at(plan, layers.stop)) if first else (),
    )


def crossing(
    plan: StepPlan | None,
    readings: Iterable[LateReading],
    request_ids: Sequence[str],
    layer: int,
) -> Iterator[Part]:
    """What crosses the border before a layer, in an order that both sides know."""
    here = None if plan is None else plan.variant_at(layer)
    # Chosen by then: what a stage chooses that begins right behind the border, the layer before it has scored.
    if here is not None and here.num_rows and _chosen(plan, layer):
        yield Part(What.ROWS, (), here.num_rows)
    # Of an image's stages with one rank the one that takes most speaks for all.
    counts: dict[tuple[What, Key], int] = {}
    for _, part in _looked_at(plan, layer):
        told = part.what, part.key
        counts[told] = max(part.length, counts.get(told, 0))
    for (what, key), count in counts.items():
        yield Part(what, key, count)
    for reading in readings:
        if reading.layer < layer:
            yield Part(What.MASS, (request_ids[reading.request], reading.layer), reading.visible)


def _chosen(plan: StepPlan | None, layer: int) -> bool:
    """Whether a device has chosen rows that are alive in a layer."""
    variants = () if plan is None else plan.variants
    return any(variant.rankings for variant in variants if variant.first_layer <= layer)


def _looked_at(plan: StepPlan | None, layer: int) -> Iterator[tuple[Ranking, Part]]:
    """The choices behind a layer that go by what the first stage alone is given, and what it makes of that."""
    variants = () if plan is None else plan.variants
    for ranking in (r for v in variants if v.first_layer > layer for r in v.rankings):
        rank = RANKS[ranking.choice.rank]
        if isinstance(rank, (PictureRank, TowerRank)):
            yield ranking, Part(What.ORDER, ranking.key, ranking.choice.ordered)
        elif isinstance(rank, QuestionRank) and rank.weights is not None:
            yield ranking, Part(What.WEIGHTS, ranking.key, ranking.question)
