"""Finds the tokens of an image in its extent, on the device: separators between its tokens are text.

Pictures of one kind have the same places, so that what the host knows of them is sent once and kept.

Legend: M rows of an image's extent that are left, N tokens of the image, K rows of it that stay, R rows alive.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from vllm_flow.engine.worker.sending import sent
from vllm_flow.layout_stages import Choice
from vllm_flow.step import Ranking


class ChoicePlaces:
    """Integers of the host as tensors.

    Args:
        most: tables kept; more than that and all are sent anew.
    """

    def __init__(self, most: int) -> None:
        self._tables: dict[tuple[str, tuple[int, ...], torch.device], torch.Tensor] = {}
        self._most = most

    def text(self, choice: Choice, offsets_M: torch.Tensor) -> torch.Tensor:
        """[M] whether each row is text.

        Args:
            offsets_M: of the rows, in the image's extent.
        """
        at = self._table("text", choice.text, offsets_M.device)
        text = torch.zeros(choice.stop - choice.start, dtype=torch.bool, device=offsets_M.device)
        return text.index_fill(0, at, True)[offsets_M]

    def picked(self, choice: Choice, offsets_M: torch.Tensor) -> torch.Tensor:
        """[M] 1 for the tokens that a rank by place picks, counted among those that are left."""
        picks = self._table("picks", choice.picks or (), offsets_M.device)
        text_M = self.text(choice, offsets_M)
        picked = torch.zeros(choice.left + 1, device=offsets_M.device)
        picked[picks] = 1
        return picked[(~text_M).cumsum(0).sub(1).clamp_min(0)].masked_fill(text_M, 0)

    def among(
        self, choice: Choice, tokens: tuple[int, ...], offsets_M: torch.Tensor
    ) -> torch.Tensor:
        """[M] whether each row is one of some tokens of the whole image, counted without text; of rows of text,
        anything."""
        at = self._table("among", tokens, offsets_M.device)
        total = choice.stop - choice.start - len(choice.text)
        found = torch.zeros(total, dtype=torch.bool, device=offsets_M.device)
        if choice.text:
            offsets_M = self.token_of_offset(choice, offsets_M.device)[offsets_M]
        return found.index_fill(0, at, True)[offsets_M]

    def keep_best(
        self,
        ranking: Ranking,
        scores_M: torch.Tensor,
        offsets_M: torch.Tensor,
        gather_R: torch.Tensor,
    ) -> None:
        """Write what stays of an image into ``gather``: its text, and of its tokens those of the highest scores.

        Args:
            scores_M: of the rows, those of text among them: anything.
            gather_R: the variant's, [R] rows of the variant before; written to.
        """
        choice = ranking.choice
        if choice.text:
            scores_M = scores_M.masked_fill(self.text(choice, offsets_M), float("inf"))
        # Stable, so that of equals the first ones stay, whatever the device.
        best_K = scores_M.argsort(descending=True, stable=True)[: choice.keep].sort().values
        gather_R[ranking.target : ranking.target + choice.keep] = best_K + ranking.source

    def tokens(self, choice: Choice, device: torch.device) -> torch.Tensor:
        """[N] offsets of the image's tokens in its extent."""
        return self._table("tokens", _token_places(choice.stop - choice.start, choice.text), device)

    def token_of_offset(self, choice: Choice, device: torch.device) -> torch.Tensor:
        """[extent] which token of the image stands at each offset; anything at text."""
        at = self.tokens(choice, device)
        found = torch.zeros(choice.stop - choice.start, dtype=torch.int64, device=device)
        return found.index_copy(0, at, torch.arange(len(at), device=device))

    def _table(self, name: str, values: tuple[int, ...], device: torch.device) -> torch.Tensor:
        key = (name, values, device)
        if key not in self._tables:
            if len(self._tables) >= self._most:
                self._tables.clear()
            host = torch.tensor(values, dtype=torch.int64)
            self._tables[key] = sent(host, device)
        return self._tables[key]


@lru_cache(maxsize=64)
def _token_places(extent: int, text: tuple[int, ...]) -> tuple[int, ...]:
    """Offsets of an extent that are no text."""
    return tuple(sorted(set(range(extent)) - set(text)))
