"""The towers of LLaVA's line, whose rows are the tokens of a picture or of its tiles.

Seams, replaced while pictures are encoded: ``forward`` of the attention of the layer whose output the decoder
gets (vLLM builds the tower up to it, so that it is the last), and of the first one; of ``multi_modal_projector``, which
is called again for rows that were merged; and ``_merge_image_patch_embeddings`` of LLaVA-NeXT and LLaVA-OneVision.

Legend: P pictures or tiles of a call, L rows of the tower, Q heads of this worker, D their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.tower.attention import watching
from vllm_flow.engine.worker.tower.scores import Kind, Scores
from vllm_flow.ranks import TowerRows, TowerScore, TowerTiles

MERGE = "_merge_image_patch_embeddings"
"""Puts a picture's tokens together from those of its tiles, without those of padding."""
NEWLINE = "image_newline"
"""Of a model that does: what ends a row. Some hand it to the method besides."""
END: Mapping[Kind, float] = {
    **dict.fromkeys((*TowerScore, TowerTiles.EARLY), float("inf")),
    TowerTiles.TILE: -1,
}
"""What the ends of rows have, which are no patches; 0 of what is not here. An infinite score keeps them before all."""


class LlavaView:
    """The tower of a model of LLaVA's line, whose rows are the tokens of one tile.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision as loaded.
        attention: vLLM's ``MMEncoderAttention`` of the layer to read.
        early: that of the tower's first layer.
    """

    def __init__(self, model: Any, attention: Any, early: Any) -> None:
        self._model, self._attention, self._early = model, attention, early
        self._tiled = model if hasattr(model, MERGE) else None
        self._first = int(model.config.vision_feature_select_strategy == "default")
        """The tower's row that is the first token; a class token is none by default."""

    @contextmanager
    def looking(self, kinds: Iterable[Kind]) -> Iterator[Callable[[], Scores]]:
        """See :class:`vllm_flow.engine.worker.tower.scores.View`."""
        kinds = [*kinds]
        projector = self._model.multi_modal_projector if TowerRows.FEATURES in kinds else None
        early_kinds = [TowerScore.CLASS] if TowerTiles.EARLY in kinds else []
        with (
            watching(self._attention, kinds, self._first) as found,
            watching(self._early, early_kinds, self._first) as found_early,
            noting_inputs(projector) as features,
            merging(self._tiled) as merges,
        ):

            def tokens() -> Scores:
                rows = {**found(), **features()}
                for early in found_early().values():
                    rows[TowerTiles.EARLY] = early
                if TowerTiles.TILE in kinds and rows:
                    rows[TowerTiles.TILE] = self._tiles(next(iter(rows.values())), merges)
                return self._tokens(rows, merges)

            yield tokens

    @property
    def project(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """See :class:`vllm_flow.engine.worker.tower.scores.View`."""
        return self._model.multi_modal_projector  # type: ignore[no-any-return]

    def _tokens(self, rows: Scores, merges: Sequence[Merge]) -> Scores:
        """Rows of tokens from those of the tower."""
        if self._tiled is None:
            return rows
        return {
            kind: torch.cat([*merged(self._tiled, merges, found, END.get(kind, 0))])
            for kind, found in rows.items()
        }

    def _tiles(self, like: torch.Tensor, merges: Sequence[Merge]) -> torch.Tensor:
        """[tiles of all pictures, patches, 1] index of each one's tile in its picture."""
        found = like.new_zeros(*like.shape[:2], 1, dtype=torch.float32)
        first = 0
        for one in merges:
            found[first : first + one.tiles] = torch.arange(one.tiles).to(found)[:, None, None]
            first += one.tiles
        return found


@dataclass(frozen=True)
class Merge:
    """How a picture's tokens were put together."""

    size: Any
    """Of the picture."""
    tiles: int
    """That the tower saw of it."""
    options: Mapping[str, Any]


@contextmanager
def noting_inputs(projector: Any) -> Iterator[Callable[[], Scores]]:
    """Note what a projector is given, [tiles, patches, C]; nothing of none."""
    given: list[torch.Tensor] = []
    project = getattr(projector, "forward", None)

    def noting(features: torch.Tensor) -> Any:
        given.append(features)
        return project(features)

    with replaced("forward", [] if project is None else [(projector, noting)]):
        yield lambda: {TowerRows.FEATURES: torch.cat(given)} if given else {}


@contextmanager
def merging(model: Any) -> Iterator[list[Merge]]:
    """Note how a model that sees pictures in tiles merges them; nothing of another (None)."""
    noted: list[Merge] = []
    if model is None:
        yield noted
        return
    merge = getattr(model, MERGE)

    def noting(size: Any, tiles: torch.Tensor, **options: Any) -> Any:
        noted.append(Merge(size, len(tiles), options))
        return merge(size, tiles, **options)

    with replaced(MERGE, [(model, noting)]):
        yield noted


def merged(
    model: Any, merges: Sequence[Merge], rows: torch.Tensor, end: float
) -> Iterator[torch.Tensor]:
    """Per picture [N, width] of its tokens, put together as the tokens were.

    Args:
        rows: [tiles of all pictures, patches of a tile, width].
        end: what the ends of rows of patches have, which the model adds.
    """
    merge = getattr(model, MERGE)
    ends = rows.new_full(rows.shape[-1:], end)
    with replaced(NEWLINE, [(model, ends)]):
        parts = rows.split([one.tiles for one in merges])
        for one, part in zip(merges, parts, strict=True):
            handed = {NEWLINE: ends} if NEWLINE in one.options else {}
            yield merge(one.size, part, **{**one.options, **handed})
