"""Chooses which rows of an image stay, where only the device can tell: by embeddings, or by attention.

Seams: the embeddings that the model is called with, the hidden states that enter the first decoder layer, and
``forward`` of the ``Attention`` of the layer before a stage, wrapped for that one call. Nothing waits for the
device: how many rows stay is known to the host, and which ones is written over a part of the variant's ``gather``.

Legend: T rows of the step, R of them alive, M rows of an image's extent that are left, K of them stay,
N tokens of the image, H hidden size, Q query heads, S slots that a row sees, B blocks of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_flow.engine import obstacles
from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.attention.keys import KeyReader, UnreadableKeys, key_reader
from vllm_flow.engine.worker.attention.row_mass import mass, mass_of_rows, mean_over_workers
from vllm_flow.engine.worker.caches import cached_layers
from vllm_flow.engine.worker.choosing.choice_places import ChoicePlaces
from vllm_flow.engine.worker.choosing.device_ranking import DeviceRanking, DeviceReading
from vllm_flow.engine.worker.choosing.known import Known
from vllm_flow.engine.worker.choosing.late_scores import LateScores
from vllm_flow.engine.worker.choosing.layer_ranks import LayerRanks
from vllm_flow.engine.worker.choosing.merging import Merger
from vllm_flow.engine.worker.choosing.picture_orders import ORDERS_KEPT, PictureOrders
from vllm_flow.engine.worker.tower.scores import Encoded
from vllm_flow.ranks import RANKS, PictureRank, QuestionRank, TowerRank, merges
from vllm_flow.ranks.base import Needs
from vllm_flow.step import Ranking

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_flow.engine.families.decoder_parts import Decoder

logger = init_logger("vllm.vllm_flow.ranking")


class Ranker:
    """Chooses for one decoder, one step at a time.

    Args:
        kv_cache_config: names the layers of each group, whose caches are allocated.
        layers: attention layer name -> vLLM's ``Attention``.
        decoder: the parts of the decoder.
        encoded: the runner's encoder cache.
        project: see :class:`vllm_flow.engine.worker.tower.scores.View`.
    """

    def __init__(
        self,
        kv_cache_config: KVCacheConfig,
        layers: Mapping[str, Any],
        decoder: Decoder,
        encoded: Encoded,
        project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._orders, self._merger = PictureOrders(encoded), Merger(encoded, project)
        self._attention: dict[int, tuple[Any, KeyReader | None]] = {}
        self.unreadable: str | None = None
        """Why ranks by attention cannot read the keys of this cache; None where they can."""
        self._places = ChoicePlaces(ORDERS_KEPT)
        self._scores: dict[tuple[int, int], torch.Tensor] = {}
        self._merged: set[tuple[int, int]] = set()
        """Request and image of which tokens were merged in this step."""
        self.late_scores = LateScores(self._places)
        self.known = Known(self.late_scores)
        for layer in cached_layers(kv_cache_config, layers, self._reader):
            self._attention[layer.index] = layer.attention, layer.found
        attention = {index: found[0] for index, found in self._attention.items() if index >= 0}
        self.layer_ranks = LayerRanks(decoder, attention, self._places)

    @property
    def obstacles(self) -> dict[str, str]:
        """Which ranks cannot be had of this decoder and its cache, and why; see :mod:`vllm_flow.engine.obstacles`."""
        own = {} if self.unreadable is None else {obstacles.RANKS: self.unreadable}
        return own | self.layer_ranks.obstacles

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
        self.known.forget()
        self._scores.clear()
        self._merged.clear()
        self.layer_ranks.forget()

    def forget_pictures(self) -> None:
        """Drop what is remembered of pictures: others' weights give other embeddings."""
        self._orders.forget()

    def merge(self, rankings: Sequence[DeviceRanking], embeddings_TH: torch.Tensor) -> None:
        """Write what kept tokens become where their rank merges; before the decoder looks at the embeddings.

        Args:
            embeddings_TH: what the model is called with, good for this step alone; written to.
        """
        for device in rankings:
            ranking, choice = device.ranking, device.ranking.choice
            if not merges(device.rank):
                continue
            order = self._order(ranking, choice.ordered, embeddings_TH)
            self.known.orders[ranking.key] = order
            kept_K = order[: choice.keep - len(choice.text)]
            rows_NH = self._tokens(ranking, embeddings_TH)
            merged_KH = self._merger.merged(device.rank, ranking.picture, rows_NH, kept_K)
            if choice.text:
                kept_K = self._places.tokens(choice, kept_K.device)[kept_K]
            embeddings_TH.index_copy_(0, kept_K + ranking.first_row, merged_KH)
            self._merged.add(device.key)

    def look(self, rankings: Sequence[DeviceRanking], hidden_TH: torch.Tensor) -> None:
        """Look at embeddings, before any layer changes them in place: put pictures' tokens in order, say which
        rows of a question count."""
        wanted: dict[tuple[int, int, str], tuple[Ranking, int]] = {}
        for device in rankings:
            ranking = device.ranking
            if isinstance(device.rank, (PictureRank, TowerRank)):
                if ranking.key in self.known.orders:  # and merged
                    continue
                _, count = wanted.get(ranking.key, (ranking, 0))
                wanted[ranking.key] = ranking, max(count, ranking.choice.ordered)
            elif isinstance(device.rank, QuestionRank) and device.rank.weights is not None:
                question = slice(ranking.question_row, ranking.question_row + ranking.question)
                self.known.weights[ranking.key] = device.rank.weights(
                    self._tokens(ranking, hidden_TH), hidden_TH[question]
                )
        for key, (ranking, count) in wanted.items():
            self.known.orders[key] = self._order(ranking, count, hidden_TH)

    def _order(self, ranking: Ranking, count: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[count or more] tokens of a picture, best first; remembered under the picture's name.

        But where tokens were merged: then embeddings are not the picture's alone."""
        merged = (ranking.request, ranking.choice.image) in self._merged
        return self._orders.order(
            RANKS[ranking.choice.rank],
            ranking.picture,
            self._tokens(ranking, hidden_TH),
            count,
            remembered=bool(ranking.picture) and not merged,
        )

    def _tokens(self, ranking: Ranking, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[N, H] embeddings of an image's tokens."""
        choice = ranking.choice
        extent_H = hidden_TH[ranking.first_row : ranking.first_row + choice.stop - choice.start]
        if not choice.text:
            return extent_H
        return extent_H.index_select(0, self._places.tokens(choice, hidden_TH.device))

    @contextmanager
    def watching(
        self,
        layer: int,
        rankings: Sequence[DeviceRanking],
        rows: torch.Tensor | None,
        late: Sequence[DeviceReading] = (),
    ) -> Iterator[None]:
        """Read the attention, queries and keys of one layer while it runs.

        Args:
            rows: [R] rows of the step that are alive, None where all are.
            late: what is noted in :attr:`late_scores`.
        """
        attention, read = self._attention[layer]
        attending = [device for device in rankings if device.by_attention]
        if read is None and (attending or late):  # such requests are refused
            raise RuntimeError(self.unreadable)
        forward = attention.forward

        def watched(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.layer_ranks.note_keys(rankings, *args[:1])
            output = forward(query, *args, **kwargs)
            for device in attending:
                self._scores[device.key] = self.attended(attention, read, query, device, rows)
            for found in late:
                row, visible = query[found.reading.row], found.reading.visible
                mass_P = mean_over_workers(mass(attention, read, row, found.blocks, visible))
                self.late_scores.note(found.request_id, layer, mass_P)
            return output

        with (
            self.layer_ranks.watching(layer, rankings, rows, self._scores.__setitem__),
            replaced("forward", [(attention, watched)]),
        ):
            yield

    def attended(
        self,
        attention: Any,
        read: KeyReader,
        query: torch.Tensor,
        device: DeviceRanking,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """[M] probability that one row gives each row of the image, or those of the question do on average; averaged
        over all heads."""
        ranking, choice = device.ranking, device.ranking.choice
        keys = slice(ranking.first_key, ranking.first_key + choice.left)
        if isinstance(device.rank, QuestionRank):
            asking, weights_Q = query[device.question_rows], self.known.weights.get(ranking.key)
            mass_S = mass_of_rows(
                attention, read, asking, device.blocks, ranking.visible, weights_Q
            )
            return mean_over_workers(mass_S[keys].contiguous())
        row, last = query[ranking.query], None
        if choice.text and device.rank.needs == Needs.IMAGE:
            # Whose row is the image's last token, and not text, is known only here.
            text_M = self._places.text(choice, device.offsets(rows, query.device))
            index_M = torch.arange(choice.left, device=query.device)
            last = index_M.masked_fill(text_M, -1).max()
            row = query.index_select(0, (last + ranking.source).view(1))[0]
            last = last + ranking.first_key
        mass_S = mass(attention, read, row, device.blocks, ranking.visible, last)
        return mean_over_workers(mass_S[keys].contiguous())

    def compare(
        self,
        rankings: Sequence[DeviceRanking],
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> None:
        """Score images by the hidden states that enter a stage's layer, where that is what their rank goes by.

        Args:
            rows: [R] rows of the step in the variant before, None where that is all of them.
        """
        self._scores.update(self.layer_ranks.compare(rankings, hidden_RH, residual_RH, rows))

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
            offsets_M = device.offsets(rows, gather_R.device)
            if choice.picks is not None:
                scores_M = self._places.picked(choice, offsets_M)
            elif device.by_layer:
                scores_M = self._scores.pop(device.key)
            else:
                scores_M = self._by_order(ranking, offsets_M)
            self._places.keep_best(ranking, scores_M, offsets_M, gather_R)

    def _by_order(self, ranking: Ranking, offsets_M: torch.Tensor) -> torch.Tensor:
        """[M] scores by the picture's order; the lowest for tokens that were not put in order."""
        choice = ranking.choice
        order = self.known.orders[ranking.key]
        tokens = choice.stop - choice.start - len(choice.text)
        place_N = torch.full((tokens,), float(tokens), device=order.device)
        place_N[order] = torch.arange(len(order), dtype=place_N.dtype, device=order.device)
        if choice.text:
            offsets_M = self._places.token_of_offset(choice, offsets_M.device)[offsets_M]
        return -place_N[offsets_M]
