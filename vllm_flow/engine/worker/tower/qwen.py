"""The towers of Qwen's line, whose merger makes one token of a square of patches.

Seams, replaced while pictures are encoded: ``forward`` of the whole tower, for the pictures' grids, and of the
attention of its last layer, whose output the merger gets. Rows of the tower that become one token follow one
another; Qwen2.5-VL's tower has the tokens in the order of its windows, whichever of its layers one looks at.

Legend: P frames or windows of as many rows each, L rows of one, Q heads of this worker, D their size, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeAlias

import torch

from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.tower.attention import mean_keys, received_attention
from vllm_flow.engine.worker.tower.scores import Kind, Scores
from vllm_flow.ranks import TowerRows, TowerScore

Grid: TypeAlias = "tuple[int, int, int]"
"""Of a picture: frames, and rows and columns of patches."""


class QwenView:
    """The tower of a model of Qwen's line, which has no class token.

    A token's score is the mean of its patches', and so is its key.

    Args:
        tower: vLLM's, as loaded.
    """

    def __init__(self, tower: Any) -> None:
        self._tower, self._attention = tower, tower.blocks[-1].attn.attn
        full = getattr(tower, "fullatt_block_indexes", None)
        self._windowed = full is not None and len(tower.blocks) - 1 not in full
        self._reordered = full is not None

    @contextmanager
    def looking(self, kinds: Iterable[Kind]) -> Iterator[Callable[[], Scores]]:
        """See :class:`vllm_flow.engine.worker.tower.scores.View`."""
        attend, encode = self._attention.forward, self._tower.forward
        grids: list[list[Grid]] = []
        found: dict[Kind, list[torch.Tensor]] = {
            kind: [] for kind in kinds if kind in (TowerScore.RECEIVED, TowerRows.KEYS)
        }

        def noting(pixels: Any, grid_thw: Any, *args: Any, **kwargs: Any) -> Any:
            grids.append([(int(t), int(h), int(w)) for t, h, w in grid_thw])
            return encode(pixels, grid_thw, *args, **kwargs)

        def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if TowerScore.RECEIVED in found:
                found[TowerScore.RECEIVED].extend(self._scores(query, key, grids[-1]))
            if TowerRows.KEYS in found:
                found[TowerRows.KEYS].extend(self._keys(key, grids[-1]))
            return attend(query, key, *args, **kwargs)

        with replaced("forward", [(self._attention, watched), (self._tower, noting)]):
            yield lambda: {kind: torch.cat(parts) for kind, parts in found.items() if parts}

    project = None
    """One token is made of several patches."""

    def _scores(
        self, query: torch.Tensor, key: torch.Tensor, grids: Sequence[Grid]
    ) -> Iterator[torch.Tensor]:
        """Per picture [N, 1], from [1, rows of all pictures, Q, D]."""
        counts = [t * h * w for t, h, w in grids]
        for grid, queries, keys in zip(
            grids, query[0].split(counts), key[0].split(counts), strict=True
        ):
            received = received_in_parts(queries, keys, self._attention.scale, self._lengths(grid))
            yield self._tokens(received[:, None], grid)

    def _keys(self, key: torch.Tensor, grids: Sequence[Grid]) -> Iterator[torch.Tensor]:
        """Per picture [N, D], from [1, rows of all pictures, Q, D]."""
        keys = mean_keys(key)[0].split([t * h * w for t, h, w in grids])
        for grid, rows in zip(grids, keys, strict=True):
            yield self._tokens(rows, grid)

    def _tokens(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        """[N, width] of a picture's tokens in their order, from [rows, width]."""
        tokens_N = rows.unflatten(0, (-1, self._tower.spatial_merge_size**2)).mean(1)
        if not self._reordered:
            return tokens_N
        index, _ = self._tower.get_window_index_thw(*grid)
        return torch.empty_like(tokens_N).index_copy_(0, index.to(tokens_N.device), tokens_N)

    def _lengths(self, grid: Grid) -> list[int]:
        """Rows of the parts that a picture attends in, in the order of its rows."""
        frames, height, width = grid
        if not self._windowed:
            return [height * width] * frames
        _, ends = self._tower.get_window_index_thw(*grid)
        return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def received_in_parts(
    query: torch.Tensor, key: torch.Tensor, scale: float, lengths: Sequence[int]
) -> torch.Tensor:
    """[rows] what each row receives, where rows attend within parts of so many rows that follow one another.

    Args:
        query, key: [rows, Q, D].
    """
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = []
    for (length, _), queries, keys in zip(runs, query.split(sizes), key.split(sizes), strict=True):
        some = (rows.unflatten(0, (-1, length)) for rows in (queries, keys))
        parts.append(received_attention(*some, scale).flatten())
    return torch.cat(parts)
