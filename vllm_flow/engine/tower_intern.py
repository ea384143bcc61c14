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

from vllm_flow.engine.tower_attention import watching
from vllm_flow.engine.tower_scores import Scores
from vllm_flow.ranks import TowerScore


class InternView:
    """The tower of InternVL. A token's score is the mean of its patches'.

    Args:
        model: as loaded; its own ``pixel_shuffle`` says which patches become which token.
        attention: vLLM's ``MMEncoderAttention`` of the layer to read.
    """

    def __init__(self, model: Any, attention: Any) -> None:
        self._model, self._attention = model, attention

    @contextmanager
    def looking(self, kinds: Iterable[TowerScore]) -> Iterator[Callable[[], Scores]]:
        """See :class:`vllm_flow.engine.tower_scores.View`."""
        with watching(self._attention, kinds, first=1) as found:
            yield lambda: {kind: self._tokens(scores) for kind, scores in found().items()}

    def _tokens(self, scores: torch.Tensor) -> torch.Tensor:
        """[tiles, width, height] of tokens, from [tiles, patches]."""
        side = isqrt(scores.shape[1])
        patches = scores.view(-1, side, side, 1)
        shuffled: torch.Tensor = self._model.pixel_shuffle(
            patches, scale_factor=self._model.downsample_ratio
        )
        return shuffled.mean(-1)
