"""The tower of InternVL, whose pixel shuffle makes one token of a square of patches.

Seam, replaced while pictures are encoded: ``forward`` of the attention of the tower's last layer. The tower has a
class token, which is dropped, and sees a picture in tiles, whose tokens follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

import torch

from vllm_flow.engine.worker.tower.attention import watching
from vllm_flow.engine.worker.tower.scores import Kind, Scores


class InternView:
    """The tower of InternVL. A token's score is the mean of its patches', and so is its key.

    Args:
        model: as loaded; its own ``pixel_shuffle`` says which patches become which token.
        attention: vLLM's ``MMEncoderAttention`` of the layer to read.
    """

    def __init__(self, model: Any, attention: Any) -> None:
        self._model, self._attention = model, attention

    @contextmanager
    def looking(self, kinds: Iterable[Kind]) -> Iterator[Callable[[], Scores]]:
        """See :class:`vllm_flow.engine.worker.tower.scores.View`."""
        with watching(self._attention, kinds, first=1) as found:
            yield lambda: {kind: self._tokens(rows) for kind, rows in found().items()}

    project = None
    """One token is made of several patches."""

    def _tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """[tiles, height, width, D] of tokens, from rows [tiles, patches, D]."""
        side, width = isqrt(rows.shape[1]), rows.shape[-1]
        shuffled: torch.Tensor = self._model.pixel_shuffle(
            rows.view(-1, side, side, width), scale_factor=self._model.downsample_ratio
        )
        return shuffled.unflatten(-1, (-1, width)).mean(-2)
