"""Which rows of an image stay, where only the device can tell: by embeddings, or by attention.

Seams: the hidden states that enter the first decoder layer, and ``forward`` of the ``Attention`` of the
layer before a stage, wrapped for that one call. Nothing waits for the device: how many rows stay is
known to the host, and which ones is written over a part of the variant's ``gather``.

Legend: T rows of the step, R of them alive, M rows of an image's extent that are left, K of them stay,
N tokens of the image, H hidden size, Q query heads, S slots that a row sees, B blocks of a request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_flow.engine.attention.keys import KeyReader, UnreadableKeys, key_reader
from vllm_flow.engine.attention.row_mass import mass, mean_over_workers
from vllm_flow.engine.caches import cached_layers
from vllm_flow.engine.choice_places import ChoicePlaces
from vllm_flow.engine.farthest_first import fast_order
from vllm_flow.engine.hiding import hidden
from vllm_flow.ranks import RANKS, AttentionRank, PictureRank
from vllm_flow.ranks.base import Needs
from vllm_flow.rewriting import LateReading
from vllm_flow.step import Ranking, StepPlan

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.vllm_flow.ranking")

ORDERS_KEPT = 1024
"""Pictures whose order is remembered; an order is as many integers as tokens were put in order."""


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
    def by_attention(self) -> bool:
        return isinstance(self.rank, AttentionRank)


@dataclass(frozen=True)
class DeviceReading:
    """A row whose attention decides what stays of its prompt once that is computed."""

    request_id: str
    reading: LateReading
    blocks: torch.Tensor
    """[B] blocks of the request, or more, in the storage group of the layer."""


class Ranker:
    """Chooses for one decoder, one step at a time.

    Args:
        kv_cache_config: names the layers of each group, whose caches are allocated.
        layers: attention layer name -> vLLM's ``Attention``.
    """

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None:
        self._attention: dict[int, tuple[Any, KeyReader | None]] = {}
        self.unreadable: str | None = None
        """Why ranks by attention cannot read the keys of this cache; None where they can."""
        self._orders: OrderedDict[tuple[str, str, int], torch.Tensor] = OrderedDict()
        """Picture's name, rank and number of tokens: clients who name their pictures may use a name twice."""
        self._places = ChoicePlaces(ORDERS_KEPT)
        self._ordered: dict[tuple[int, int, str], torch.Tensor] = {}
        self._scores: dict[tuple[int, int], torch.Tensor] = {}
        self._late: dict[str, dict[int, torch.Tensor]] = {}
        """Request -> layer -> [P] what the last row of its prompt gave each of its tokens there."""
        for layer in cached_layers(kv_cache_config, layers, self._reader):
            self._attention[layer.index] = layer.attention, layer.found

    def _reader(self, attention: Any) -> KeyReader | None:
        try:
            return key_reader(attention)
        except (ValueError, RuntimeError, AttributeError) as error:
            # A cliff, and ranks by place or picture, need no keys: whoever sends others is told.
            self.unreadable = error.reason if isinstance(error, UnreadableKeys) else str(error)
            logger.warning("Ranks by attention are refused by this engine: %s.", self.unreadable)
            return None

    def forget(self) -> None:
        """Drop what a step that is over, or was given up, has left."""
        self._ordered.clear()
        self._scores.clear()

    def remove(self, request_id: str) -> None:
        """Drop what is kept of a request until its images leave."""
        self._late.pop(request_id, None)

    def forget_pictures(self) -> None:
        """Drop what is remembered of pictures: others' weights give other embeddings."""
        self._orders.clear()

    def look(self, rankings: Sequence[DeviceRanking], hidden_TH: torch.Tensor) -> None:
        """Put the tokens of pictures in order, before any layer changes the embeddings in place."""
        wanted: dict[tuple[int, int, str], tuple[Ranking, int]] = {}
        for device in rankings:
            ranking, choice = device.ranking, device.ranking.choice
            if isinstance(device.rank, PictureRank):
                key = (ranking.request, choice.image, choice.rank)
                _, count = wanted.get(key, (ranking, 0))
                wanted[key] = ranking, max(count, choice.ordered)
        for key, (ranking, count) in wanted.items():
            self._ordered[key] = self._order(ranking, count, hidden_TH)

    def _order(self, ranking: Ranking, count: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[count or more] tokens of a picture, best first; remembered under the picture's name."""
        choice, rank = ranking.choice, RANKS[ranking.choice.rank]
        assert isinstance(rank, PictureRank)
        extent = choice.stop - choice.start
        name = (ranking.picture, choice.rank, extent - len(choice.text))
        known = self._orders.get(name)
        if ranking.picture and known is not None and len(known) >= count:
            self._orders.move_to_end(name)
            return known
        rows_NH = hidden_TH[ranking.first_row : ranking.first_row + extent]
        if choice.text:
            rows_NH = rows_NH.index_select(0, self._places.tokens(choice, hidden_TH.device))
        order = fast_order(rank, hidden_TH.device)(rows_NH, count)
        if ranking.picture:
            self._orders[name] = order
            self._orders.move_to_end(name)
            while len(self._orders) > ORDERS_KEPT:
                self._orders.popitem(last=False)
        return order

    @contextmanager
    def watching(
        self,
        layer: int,
        rankings: Sequence[DeviceRanking],
        rows: torch.Tensor | None,
        late: Sequence[DeviceReading] = (),
    ) -> Iterator[None]:
        """Read the attention of one layer while it runs.

        Args:
            rows: [R] rows of the step that are alive, None where all are.
            late: what is kept until :meth:`kept_positions` asks for it.
        """
        attention, read = self._attention[layer]
        if read is None:  # such requests are refused
            raise RuntimeError(self.unreadable)
        forward = attention.forward

        def watched(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(query, *args, **kwargs)
            for device in rankings:
                key = (device.ranking.request, device.ranking.choice.image)
                self._scores[key] = self.attended(attention, read, query, device, rows)
            for found in late:
                row, visible = query[found.reading.row], found.reading.visible
                mass_P = mean_over_workers(mass(attention, read, row, found.blocks, visible))
                self._late.setdefault(found.request_id, {})[layer] = mass_P
            return output

        with hidden("forward", [(attention, watched)]):
            yield

    def attended(
        self,
        attention: Any,
        read: KeyReader,
        query: torch.Tensor,
        device: DeviceRanking,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """[M] probability that one row gives each row of the image, averaged over all heads."""
        ranking, choice = device.ranking, device.ranking.choice
        row, last = query[ranking.query], None
        if choice.text and device.rank.needs == Needs.IMAGE:
            # Whose row is the image's last token, and not text, is known only here.
            text_M = self._places.text(choice, self._offsets(ranking, rows, query.device))
            index_M = torch.arange(choice.left, device=query.device)
            last = index_M.masked_fill(text_M, -1).max()
            row = query.index_select(0, (last + ranking.source).view(1))[0]
            last = last + ranking.first_key
        mass_S = mass(attention, read, row, device.blocks, ranking.visible, last)
        mass_M = mass_S[ranking.first_key : ranking.first_key + choice.left].contiguous()
        return mean_over_workers(mass_M)

    def kept_positions(
        self, request_id: str, plan: StepPlan, device: torch.device
    ) -> dict[int, torch.Tensor]:
        """First layer of a stage -> positions that stay of a prompt whose images leave after the prefill.

        Args:
            plan: :func:`vllm_flow.rewriting.choosing_plan` of the request.
        """
        masses = self._late.pop(request_id, {})
        rows: torch.Tensor | None = None
        found = {}
        for variant in plan.variants:
            if variant.gather is not None:
                gather = torch.from_numpy(variant.gather)
                if device.type == "cuda":
                    gather = gather.pin_memory()
                gather = gather.to(device, non_blocking=True)
                rankings = [DeviceRanking(ranking, gather) for ranking in variant.rankings]
                for one in rankings:
                    if one.by_attention and one.ranking.choice.picks is None:
                        first, left = one.ranking.source, one.ranking.choice.left
                        mass_P = masses[variant.first_layer - 1]
                        mine = slice(first, first + left)
                        scores = mass_P[mine] if rows is None else mass_P[rows[mine]]
                        self._scores[one.ranking.request, one.ranking.choice.image] = scores
                self.choose(rankings, gather, rows)
                rows = gather if rows is None else rows.index_select(0, gather)
            found[variant.first_layer] = (
                torch.arange(plan.num_rows, device=device) if rows is None else rows
            )
        return found

    def choose(
        self,
        rankings: Sequence[DeviceRanking],
        gather_R: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """Write what stays of each image into ``gather``.

        Args:
            gather_R: the variant's, [R] rows of the variant before; written to.
            rows: rows of the step in the variant before, None where that is all of them.
        """
        for device in rankings:
            ranking, choice = device.ranking, device.ranking.choice
            offsets_M = self._offsets(ranking, rows, gather_R.device)
            if choice.picks is not None:
                scores_M = self._places.picked(choice, offsets_M)
            elif device.by_attention:
                scores_M = self._scores.pop((ranking.request, choice.image))
            else:
                scores_M = self._by_order(ranking, offsets_M)
            if choice.text:
                scores_M = scores_M.masked_fill(self._places.text(choice, offsets_M), float("inf"))
            # Stable, so that of equals the first ones stay, whatever the device.
            best_K = scores_M.argsort(descending=True, stable=True)[: choice.keep].sort().values
            gather_R[ranking.target : ranking.target + choice.keep] = best_K + ranking.source

    def _by_order(self, ranking: Ranking, offsets_M: torch.Tensor) -> torch.Tensor:
        """[M] scores by the picture's order; the lowest for tokens that were not put in order."""
        choice = ranking.choice
        order = self._ordered[ranking.request, choice.image, choice.rank]
        tokens = choice.stop - choice.start - len(choice.text)
        place_N = torch.full((tokens,), float(tokens), device=order.device)
        place_N[order] = torch.arange(len(order), dtype=place_N.dtype, device=order.device)
        if choice.text:
            offsets_M = self._places.token_of_offset(choice, offsets_M.device)[offsets_M]
        return -place_N[offsets_M]

    @staticmethod
    def _offsets(ranking: Ranking, rows: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """[M] offsets in the extent of the image's rows that are left."""
        choice = ranking.choice
        if rows is None:
            return torch.arange(choice.left, device=device)
        return rows[ranking.source : ranking.source + choice.left].long() - ranking.first_row
