"""Scores each picture's tokens in the vision tower, for ranks that look inside the tower, and keeps what they merge.

Seams: ``embed_multimodal`` of the loaded model, which both runners call with every batch of pictures that
they encode; what `views` replaces for that call; and the runners' encoder caches, which keep the tensors
that it returns. Scores are an attribute of those tensors, where vLLM has their modality: whoever finds a picture
encoded finds its scores, and they go when it goes.

Every picture is scored by the class token, whoever asks first: it costs one row of the attention of two layers, and
the next request on the picture, which finds it encoded, may be one that ranks by it. What patches receive costs
more, and what merging needs takes memory: both are noted while requests that ask for them are there, whose
pictures have names of their own (`scored_pictures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from vllm.logger import init_logger

from vllm_flow.engine import frames, obstacles
from vllm_flow.engine.scored_pictures import PIXELS, merges_in_tower, ranks_by_received
from vllm_flow.engine.worker.attention.row_mass import mean_over_workers
from vllm_flow.ranks import TowerRows, TowerScore, TowerTiles

if TYPE_CHECKING:
    from vllm_flow.layout import TokenLayout

logger = init_logger("vllm.vllm_flow.tower_scores")

Encoded: TypeAlias = "Mapping[str, torch.Tensor]"
"""A runner's encoder cache: a picture's name -> what it was encoded to."""
Kind: TypeAlias = "TowerScore | TowerTiles | TowerRows"
"""Of what is noted of a token: a number, or a row."""
Scores: TypeAlias = "Mapping[Kind, torch.Tensor]"
"""Kind -> [..., N, width] rows of the tokens of all pictures of a call, in their order; numbers are rows of width 1."""
SCORES_FIELD = "flow_scores"
"""Of an encoded picture: kind -> [N] numbers of its tokens (of their tiles, int64), [N, width] rows."""
UNSEEN: Mapping[str, str] = dict.fromkeys(
    (obstacles.TOWER, obstacles.RECEIVED, obstacles.TILES, obstacles.FRAMES),
    "which nobody looked for",
)


class View(Protocol):
    """How the tower of a model is looked into."""

    def looking(self, kinds: Iterable[Kind]) -> AbstractContextManager[Callable[[], Scores]]:
        """While pictures are encoded; then what was noted of them: scores and keys are of this worker's heads."""

    @property
    def project(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """``project(features [K, C])``: [K, H] embeddings. None where a projector does not take tokens row by row, and
        nobody notes features."""


class Tower:
    """The tower of a model whose pictures can be scored, or why they cannot.

    Args:
        view: None where nobody looks.
        unreadable: obstacle (`obstacles`) -> why not.
    """

    def __init__(self, view: View | None = None, unreadable: Mapping[str, str] = UNSEEN) -> None:
        self._view, self.unreadable = view, unreadable
        self.layouts: Mapping[str, TokenLayout] = {}
        """Of the requests that this worker knows of."""

    @property
    def readable(self) -> bool:
        """Whether there is a score to be had."""
        return not UNSEEN.keys() <= self.unreadable.keys()

    def encode(self, embed: Callable[..., Any], pictures: Mapping[str, Any]) -> Any:
        """What ``embed`` makes of pictures, each with its scores; of videos, each with its number of frames."""
        if obstacles.FRAMES not in self.unreadable and frames.there(pictures):
            return frames.noted(embed(**pictures), pictures)
        kinds = list(self._wanted())
        if self._view is None or not kinds or not any(name in pictures for name in PIXELS):
            return embed(**pictures)
        with self._view.looking(kinds) as scores_of_call:
            encoded = tuple(embed(**pictures))
        tokens = [*map(len, encoded)]
        parts = {
            kind: _tokens(kind, found).split(tokens) for kind, found in scores_of_call().items()
        }
        for index, picture in enumerate(encoded):
            setattr(picture, SCORES_FIELD, {kind: found[index] for kind, found in parts.items()})
        return encoded

    @property
    def project(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """See :class:`View`."""
        return None if self._view is None else self._view.project

    def _wanted(self) -> Iterable[Kind]:
        if obstacles.TOWER not in self.unreadable:
            yield TowerScore.CLASS
        if obstacles.TILES not in self.unreadable:
            yield from TowerTiles
        if obstacles.RECEIVED not in self.unreadable and any(
            ranks_by_received(layout) for layout in self.layouts.values()
        ):
            yield TowerScore.RECEIVED
        if any(merges_in_tower(layout) for layout in self.layouts.values()):
            yield from TowerRows


def _tokens(kind: Kind, found: torch.Tensor) -> torch.Tensor:
    """[N] or [N, width] of the tokens of all pictures, averaged over workers where each has other heads."""
    if kind == TowerRows.FEATURES:
        return found.flatten(0, -2)
    if kind == TowerTiles.TILE:
        return found.flatten().long()
    mean = mean_over_workers(found)
    return mean.flatten(0, -2) if isinstance(kind, TowerRows) else mean.flatten()


class ScoringModel:
    """Mixed in before the loaded model's own class with :class:`vllm_flow.engine.worker.model_call.FlowModel`."""

    flow_tower: Tower

    def embed_multimodal(self, **pictures: Any) -> Any:
        return self.flow_tower.encode(super().embed_multimodal, pictures)  # type: ignore[misc]


def encoded(runner: Any) -> Encoded:
    """The encoder cache of a runner of either version; empty where a model has no encoder."""
    cache = getattr(runner, "encoder_cache", None)
    found: Encoded = {} if cache is None else getattr(cache, "encoder_outputs", cache)
    return found


def scores_of(cache: Encoded, picture: str, kind: TowerScore) -> torch.Tensor:
    """[N] of a picture whose tokens a step computes, which is therefore encoded.

    The front end refuses the rank where a picture comes as embeddings. But clients may name their pictures, and
    one may have sent embeddings under the name of another's pixels: vLLM then goes by what came first. Of that
    nothing is known, so all tokens are alike, and the first ones stay.
    """
    scores_N = noted(cache, picture).get(kind)
    if scores_N is not None:
        return scores_N
    logger.warning_once(
        "A picture is to be ranked by the vision tower's attention that came as embeddings under the same name "
        "before: its first tokens stay. Give every picture a name (uuid) of its own, or none."
    )
    found = cache[picture]
    return found.new_zeros(len(found), dtype=torch.float32)


def tiles_of(cache: Encoded, picture: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a :class:`vllm_flow.ranks.TileRank` goes by: [N] scores, those of the first layer, and tiles; all of them
    one tile of a picture of which nothing is known (:func:`scores_of`)."""
    scores_N, seen = scores_of(cache, picture, TowerScore.CLASS), noted(cache, picture)
    if not seen:
        return scores_N, scores_N, scores_N.long()
    return scores_N, seen[TowerTiles.EARLY], seen[TowerTiles.TILE]


def noted(cache: Encoded, picture: str) -> Scores:
    """What was noted of a picture's tokens when it was encoded."""
    found: Scores = getattr(cache[picture], SCORES_FIELD, {})
    return found
