"""Scores by what a layer makes of a step's own rows: keys, hidden states, and queries before positions.

All that such ranks look at is computed in one step, so nothing is read from the KV cache. Which of a model's
parts are needed, and why a model cannot be ranked so, is asked once.

Seams: ``key`` of the call of vLLM's ``Attention`` in the layer before a stage; the decoder's final norm; and
``forward`` of that layer's ``self_attn.rotary_emb``, replaced for one call.

Legend: R rows alive, M rows of an image's extent that are left, N tokens among them, K key heads, G query heads
per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from vllm_flow.engine import obstacles
from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.attention.row_mass import mean_over_workers
from vllm_flow.engine.worker.choosing.choice_places import ChoicePlaces
from vllm_flow.engine.worker.choosing.device_ranking import DeviceRanking
from vllm_flow.engine.worker.latent import is_latent
from vllm_flow.ranks import HiddenRank, UnrotatedRank

ROTATING = (
    *("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"),
    *("Qwen3DecoderLayer", "Qwen3MoeDecoderLayer", "Qwen3VLDecoderLayer", "Qwen3VLMoeDecoderLayer"),
)
"""Layers that turn all queries and keys by ``self_attn.rotary_emb``, whatever their index."""


class LayerRanks:
    """Scores of one decoder's images, one step at a time.

    Args:
        decoder: its parts.
        attention: layer -> vLLM's ``Attention``, of layers with keys.
        places: of tokens among the text of an extent.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: Mapping[int, Any],
        places: ChoicePlaces,
    ) -> None:
        self._decoder, self._attention = decoder, attention
        self._places = places
        # As it is without the hook, which stands in its place while a step runs.
        self._norm = None if decoder.norm is None else decoder.norm.forward
        self._keys: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        """(request, image) -> L1 norms of the keys of its rows, and of the question's."""
        reasons = {
            obstacles.HIDDEN: self._against_hidden(),
            obstacles.UNROTATED: self._against_unrotated(),
        }
        self.obstacles = {name: reason for name, reason in reasons.items() if reason is not None}

    def _against_hidden(self) -> str | None:
        if self._norm is None:
            return "its final norm runs with the logits, past the decoder"
        return self._against_keys()

    def _against_keys(self) -> str | None:
        own = self._attention.values()
        if any(is_latent(attention) for attention in own):
            return "its layers have latent vectors in the place of keys"
        if any(getattr(a, "kv_sharing_target_layer_name", None) is not None for a in own):
            return "its layers share keys"
        return None

    def _against_unrotated(self) -> str | None:
        for layer in self._decoder.layers:
            if type(layer).__name__ not in ROTATING:
                return f"where {type(layer).__name__} turns its queries and keys is not known"
            rotary = getattr(layer.self_attn, "rotary_emb", None)
            if not isinstance(rotary, RotaryEmbeddingBase | MRotaryEmbedding):
                return f"its positions go through {type(rotary).__name__}"
        return self._against_keys()

    def forget(self) -> None:
        """Drop what a step that is over, or was given up, has left."""
        self._keys.clear()

    def note_keys(self, rankings: Sequence[DeviceRanking], key: torch.Tensor) -> None:
        """Remember how large a layer's keys are, for :meth:`compare`.

        Args:
            key: of all rows alive, as they enter attention.
        """
        for device in rankings:
            if isinstance(device.rank, HiddenRank):
                parts = (key[device.image_rows], key[device.question_rows])
                image_M, question_Q = (part.float().abs().flatten(1).sum(1) for part in parts)
                self._keys[device.key] = mean_over_workers(image_M), mean_over_workers(question_Q)

    def compare(
        self,
        rankings: Sequence[DeviceRanking],
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Scores by the hidden states that enter a stage's layer, of the images whose rank goes by them.

        Args:
            rows: [R] rows of the step in the variant before, None where that is all of them.

        Returns:
            (request, image) -> [M].
        """
        found = {}
        for device in rankings:
            if not (device.by_layer and isinstance(device.rank, HiddenRank)):
                continue
            choice = device.ranking.choice
            states = [
                self._normed(hidden_RH[part], None if residual_RH is None else residual_RH[part])
                for part in (device.image_rows, device.question_rows)
            ]
            keys_M, keys_Q = self._keys.pop(device.key)
            text_M = self._places.text(choice, device.offsets(rows, keys_M.device))
            tokens_N = text_M.int().argsort(stable=True)[: choice.left - len(choice.text)]
            stays_N = device.rank.choose(
                states[0].index_select(0, tokens_N),
                keys_M.index_select(0, tokens_N),
                states[1],
                keys_Q,
                choice.keep - len(choice.text),
            )
            found[device.key] = torch.zeros_like(keys_M).index_copy(
                0, tokens_N, stays_N.to(keys_M.dtype)
            )
        return found

    def _normed(self, hidden_RH: torch.Tensor, residual_RH: torch.Tensor | None) -> torch.Tensor:
        """What the final norm makes of hidden states between two layers."""
        assert self._norm is not None
        states = hidden_RH.clone() if residual_RH is None else hidden_RH + residual_RH
        batched = self._decoder.call == "batched"
        normed = self._norm(states[None] if batched else states)
        normed = normed[0] if isinstance(normed, tuple) or batched else normed
        assert isinstance(normed, torch.Tensor)
        return normed

    @contextmanager
    def watching(
        self,
        layer: int,
        rankings: Sequence[DeviceRanking],
        rows: torch.Tensor | None,
        scored: Callable[[tuple[int, int], torch.Tensor], None],
    ) -> Iterator[None]:
        """Score images by queries and keys of one layer, before they are turned by their positions.

        Args:
            rows: [R] rows of the step that are alive, None where all are.
            scored: told (request, image) and [M].
        """
        asked = [device for device in rankings if isinstance(device.rank, UnrotatedRank)]
        if not asked:
            yield
            return
        decoder = self._decoder
        rotary = decoder.layers[layer - decoder.first_layer].self_attn.rotary_emb
        forward: Callable[..., Any] = rotary.forward

        def watched(positions: Any, query: torch.Tensor, key: torch.Tensor, *args: Any) -> Any:
            for device in asked:
                scored(device.key, self.unrotated(layer, device, query, key, rows))
            return forward(positions, query, key, *args)

        with replaced("forward", [(rotary, watched)]):
            yield

    def unrotated(
        self,
        layer: int,
        device: DeviceRanking,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """[M] the probability that the prompt's last token gives each token of the image, if all were as near;
        where a rank has a sample, places among the M instead, the sample's in front."""
        attention, choice = self._attention[layer], device.ranking.choice
        size = attention.head_size
        keys_KMD = key[device.image_rows].reshape(choice.left, -1, size).transpose(0, 1).float()
        query_KGD = query[device.ranking.query].reshape(len(keys_KMD), -1, size).float()
        logits_KGM = (query_KGD * attention.impl.scale) @ keys_KMD.transpose(1, 2)
        offsets_M = device.offsets(rows, key.device)
        if choice.text:
            text_M = self._places.text(choice, offsets_M)
            logits_KGM = logits_KGM.masked_fill(text_M, -float("inf"))
        mass_M = mean_over_workers(logits_KGM.softmax(-1).mean((0, 1)))
        if device.rank.sample is None:
            return mass_M
        total = choice.stop - choice.start - len(choice.text)
        sample_M = self._places.among(choice, tuple(device.rank.sample(total).tolist()), offsets_M)
        # Whole numbers: a probability added to a bonus would lose its last digits.
        behind_M = mass_M.argsort(descending=True, stable=True).argsort()
        return (sample_M * choice.left - behind_M).to(mass_M.dtype)
