"""A plan's rankings on the device: data alone. Who makes them is `metadata`, who chooses by them `ranking`.

Legend: M rows of an image's extent that are left, B blocks of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_flow.ranks import RANKS, AttentionRank
from vllm_flow.rewriting import LateReading
from vllm_flow.step import Ranking


@dataclass(frozen=True)
class DeviceRanking:
    """A plan's ranking on the device."""

    ranking: Ranking
    blocks: torch.Tensor
    """[B] blocks of the request, or more, in the storage group of the layer before the stage."""

    @property
    def rank(self) -> Any:
        return RANKS[self.ranking.choice.rank]

    @property
    def key(self) -> tuple[int, int]:
        """Request and image: one choice is made of an image at a time."""
        return self.ranking.request, self.ranking.choice.image

    @property
    def by_attention(self) -> bool:
        return isinstance(self.rank, AttentionRank)

    @property
    def by_layer(self) -> bool:
        """Whether it is scored by what the layer before the stage makes."""
        return self.ranking.choice.picks is None and self.rank.reads_layer

    @property
    def image_rows(self) -> slice:
        """The M rows, in the variant before."""
        return slice(self.ranking.source, self.ranking.source + self.ranking.choice.left)

    @property
    def question_rows(self) -> slice:
        """Rows of the question, in the variant before; see :mod:`vllm_flow.ranks.rows`."""
        return slice(self.ranking.query + 1 - self.ranking.question, self.ranking.query + 1)

    def offsets(self, rows: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """[M] offsets of the rows in the image's extent.

        Args:
            rows: rows of the step in the variant before, None where that is all of them.
        """
        if rows is None:
            return torch.arange(self.ranking.choice.left, device=device)
        return rows[self.image_rows].long() - self.ranking.first_row


@dataclass(frozen=True)
class DeviceReading:
    """A row whose attention decides what stays of its prompt once that is computed."""

    request_id: str
    reading: LateReading
    blocks: torch.Tensor
    """[B] blocks of the request, or more, in the storage group of the layer."""
