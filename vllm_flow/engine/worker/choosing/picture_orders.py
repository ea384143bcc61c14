"""Puts a picture's tokens in order, for ranks that go by it alone, and remembers the order by the picture's name.

Legend: N tokens of an image, H hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from vllm_flow.engine.frames import frame_of_tokens
from vllm_flow.engine.worker.choosing.farthest_first import fast_order
from vllm_flow.engine.worker.tower.scores import Encoded, scores_of, tiles_of
from vllm_flow.ranks import FrameRank, PictureRank, TileRank, TowerRank

ORDERS_KEPT = 1024
"""Pictures whose order is remembered; an order is as many integers as tokens were put in order."""


class PictureOrders:
    """What ranks by picture make of each.

    Args:
        encoded: the runner's encoder cache.
    """

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded
        self._known: OrderedDict[tuple[str, str, int], torch.Tensor] = OrderedDict()
        """Picture's name, rank and number of tokens: clients who name their pictures may use a name twice."""

    def forget(self) -> None:
        """Drop what is remembered: others' weights give other embeddings."""
        self._known.clear()

    def order(
        self, rank: Any, picture: str, rows_NH: torch.Tensor, count: int, remembered: bool
    ) -> torch.Tensor:
        """[count or more] tokens of a picture, best first.

        Args:
            picture: its name.
            rows_NH: its embeddings.
            remembered: whether these are the picture's alone, so that the order is found the next time.
        """
        name = (picture, rank.name, len(rows_NH))
        known = self._known.get(name) if remembered else None
        if known is not None and (count <= len(known) if rank.nested else count == len(known)):
            self._known.move_to_end(name)
            return known
        order = self._made(rank, picture, rows_NH, count)
        if remembered:
            self._known[name] = order
            self._known.move_to_end(name)
            while len(self._known) > ORDERS_KEPT:
                self._known.popitem(last=False)
        return order

    def _made(self, rank: Any, picture: str, rows_NH: torch.Tensor, count: int) -> torch.Tensor:
        if isinstance(rank, TileRank):
            return rank.order(*tiles_of(self._encoded, picture), count)
        if isinstance(rank, TowerRank):
            scores_N = scores_of(self._encoded, picture, rank.score)
            return rank.order(scores_N, rows_NH, count)
        if isinstance(rank, FrameRank):
            frame_N = frame_of_tokens(self._encoded[picture], len(rows_NH))
            return rank.order(rows_NH, frame_N, count)
        assert isinstance(rank, PictureRank)
        return fast_order(rank, rows_NH.device)(rows_NH, count)
