"""What others do about image tokens, on Hugging Face's modules: the peers of one comparison.

Written from the papers, to the same interface, with a key-value cache and batches of equal length:

- no pruning;
- the key mask of "From Redundancy to Relevance" (arXiv 2406.06579): image keys hidden from a layer
  on, every row still computed and stored;
- VTW (arXiv 2405.05803): all image rows withdrawn at layer K, which is our cliff;
- FastV (arXiv 2403.06764): at layer K the share R of the image rows goes that the last prompt token
  attends to least in layer K - 1, averaged over heads;
- PyramidDrop (arXiv 2410.17247): the same ranking at the ends of four stages of equal depth, half
  of the image rows going each time.

Rows that stay keep their rotary positions. Where a paper leaves the ranking's cost open, only the
last row's attention is computed, the cheapest way there is.

Shapes: B requests, T prompt rows, R rows alive, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_flow.profile.ideal import image_row_cost


@dataclass(frozen=True)
class Pruning:
    """Which share of the image rows is alive from which layer on."""

    name: str
    stages: tuple[tuple[int, float], ...] = ()
    """(layer, share of the original image rows alive in it and deeper), ascending layers."""
    mask: bool = False
    """Hide the keys and keep computing, instead of removing the rows; for a share of 0 only."""

    def __post_init__(self) -> None:
        layers, shares = [layer for layer, _ in self.stages], [share for _, share in self.stages]
        if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
            raise ValueError(f"{self.name}: stages must be at ascending layers, not {layers}.")
        if shares != sorted(shares, reverse=True) or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"{self.name}: shares must fall from at most 1 to 0, not {shares}.")
        if any(share > 0 and layer == 0 for layer, share in self.stages):
            raise ValueError(f"{self.name}: no layer before layer 0 could rank its rows.")
        if self.mask and shares != [0.0]:
            raise ValueError(f"{self.name}: a mask hides the whole image at one layer.")

    def image_row_cost(self, num_layers: int) -> float:
        """What an image row costs in prefill, in layers: the mean over all image rows."""
        if self.mask:
            return num_layers
        bounds = [0, *(min(layer, num_layers) for layer, _ in self.stages), num_layers]
        shares = [1.0, *(share for _, share in self.stages)]
        spans = zip(shares, bounds, bounds[1:], strict=False)
        return sum(share * (end - start) for share, start, end in spans)

    def equal_work_cliff(self, num_layers: int, key_share: float) -> int:
        """The cliff of ours at which an image row costs most nearly the same.

        Args:
            key_share: as in :func:`vllm_flow.profile.ideal.row_count_ideal`.
        """
        cost = self.image_row_cost(num_layers)
        return min(
            range(num_layers + 1),
            key=lambda cliff: abs(image_row_cost(num_layers, cliff, key_share) - cost),
        )


def none() -> Pruning:
    return Pruning("none")


def key_mask(cliff: int) -> Pruning:
    """The released code's mask, with the right span and positions."""
    return Pruning(f"key mask, layer {cliff}", ((cliff, 0.0),), mask=True)


def vtw(layer: int) -> Pruning:
    return Pruning(f"VTW K={layer}", ((layer, 0.0),))


def fastv(layer: int, dropped: float) -> Pruning:
    return Pruning(f"FastV K={layer} R={dropped:.0%}", ((layer, 1 - dropped),))


def pyramid_drop(num_layers: int, ratio: float = 0.5) -> Pruning:
    """Four stages; the share falls by ``ratio`` at each of the three borders between them."""
    stages = tuple((num_layers * n // 4, ratio**n) for n in (1, 2, 3))
    return Pruning(f"PyramidDrop λ={ratio:g}", stages)


@dataclass(frozen=True)
class PeerRun:
    """One batch: greedy tokens per request, seconds, bytes of keys and values at the end."""

    tokens: tuple[tuple[int, ...], ...]
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int


@dataclass(frozen=True)
class Batch:
    """Prompts of equal length with the image at the same places, features already computed."""

    hidden_BTD: torch.Tensor
    is_image_T: torch.Tensor

    @classmethod
    def of(cls, model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Any]) -> Batch:
        """Tokenise, run the vision tower, put its features in place.

        Raises:
            ValueError: prompts of different lengths, which would need padding.
        """
        encoded = [
            processor(text=text, images=list(pictures), return_tensors="pt")
            for text, pictures in zip(prompts, images, strict=True)
        ]
        lengths = {one["input_ids"].shape[1] for one in encoded}
        if len(lengths) != 1:
            raise ValueError(f"prompts of different lengths: {sorted(lengths)} tokens")
        ids_BT = torch.cat([one["input_ids"] for one in encoded])
        is_image_BT = ids_BT == model.config.image_token_id
        if not bool((is_image_BT == is_image_BT[0]).all()):
            raise ValueError("the image stands at different places")
        with torch.inference_mode():
            hidden_BTD = model.get_input_embeddings()(ids_BT)
            for row, one in enumerate(encoded):
                features = model.get_image_features(
                    one["pixel_values"].to(hidden_BTD.dtype),
                    vision_feature_layer=model.config.vision_feature_layer,
                    vision_feature_select_strategy=model.config.vision_feature_select_strategy,
                ).pooler_output
                hidden_BTD[row, is_image_BT[row]] = torch.cat(list(features)).to(hidden_BTD.dtype)
        return cls(hidden_BTD, is_image_BT[0])


@torch.inference_mode()
def generate(model: Any, batch: Batch, pruning: Pruning, max_tokens: int) -> PeerRun:
    """Greedy decoding of a whole batch under one pruning; ends of text are ignored.

    Raises:
        ValueError: the model's attention is not ``sdpa``, the one that is causal without a mask.
    """
    from transformers import DynamicCache

    decoder, head = model.model.language_model, model.lm_head
    if decoder.config._attn_implementation != "sdpa":
        raise ValueError('load the model with attn_implementation="sdpa".')
    cache = DynamicCache()
    start = time.perf_counter()
    token_B = head(decoder.norm(_prefill(decoder, batch, pruning, cache))).argmax(-1)
    prefilled = time.perf_counter()
    tokens = [token_B]
    for step in range(1, max_tokens):
        hidden_BD = _decode(
            decoder, model.get_input_embeddings()(token_B), step, batch, pruning, cache
        )
        token_B = head(decoder.norm(hidden_BD)).argmax(-1)
        tokens.append(token_B)
    ended = time.perf_counter()
    return PeerRun(
        tokens=tuple(tuple(row) for row in torch.stack(tokens, 1).tolist()),
        prefill_seconds=prefilled - start,
        decode_seconds=ended - prefilled,
        kv_bytes=sum(
            tensor.numel() * tensor.element_size()
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
        ),
    )


def _prefill(decoder: Any, batch: Batch, pruning: Pruning, cache: Any) -> torch.Tensor:
    """[B, D], the last row's hidden state after all layers; the cache is filled on the way."""
    hidden_BRD = batch.hidden_BTD
    size, length, _ = hidden_BRD.shape
    stages = dict(pruning.stages)
    positions_BR = torch.arange(length).expand(size, length)
    is_image_BR = batch.is_image_T.expand(size, length)
    previous_BD: torch.Tensor | None = None
    past_mask = _past_mask(batch.is_image_T) if pruning.mask else None
    for index, layer in enumerate(decoder.layers):
        if index in stages and not pruning.mask:
            keep = round(stages[index] * int(batch.is_image_T.sum()))
            scores_BR = None
            if keep:
                assert previous_BD is not None
                scores_BR = _last_row_attention(
                    decoder, index - 1, previous_BD, positions_BR[:, -1:], cache
                )
            rows_BR = _rows(is_image_BR, scores_BR, keep)
            hidden_BRD = hidden_BRD.gather(
                1, rows_BR[..., None].expand(-1, -1, hidden_BRD.shape[2])
            )
            positions_BR = positions_BR.gather(1, rows_BR)
            is_image_BR = is_image_BR.gather(1, rows_BR)
        previous_BD = hidden_BRD[:, -1]
        hidden_BRD = layer(
            hidden_BRD,
            attention_mask=past_mask if pruning.mask and index >= pruning.stages[0][0] else None,
            position_ids=positions_BR,
            past_key_values=cache,
            position_embeddings=decoder.rotary_emb(hidden_BRD, positions_BR),
        )
    return hidden_BRD[:, -1]


def _decode(
    decoder: Any, hidden_BD: torch.Tensor, step: int, batch: Batch, pruning: Pruning, cache: Any
) -> torch.Tensor:
    """[B, D] after all layers, from the embeddings [B, D] of the step-th token of the answers."""
    size, length, _ = batch.hidden_BTD.shape
    hidden_B1D = hidden_BD[:, None]
    position_B1 = torch.full((size, 1), length + step - 1)
    rotary = decoder.rotary_emb(hidden_B1D, position_B1)
    seen = None
    if pruning.mask:
        seen = torch.cat([~batch.is_image_T, torch.ones(step, dtype=torch.bool)])[None, None, None]
    for index, layer in enumerate(decoder.layers):
        hidden_B1D = layer(
            hidden_B1D,
            attention_mask=seen if pruning.mask and index >= pruning.stages[0][0] else None,
            position_ids=position_B1,
            past_key_values=cache,
            position_embeddings=rotary,
        )
    return hidden_B1D[:, -1]


def _past_mask(is_image_T: torch.Tensor) -> torch.Tensor:
    """[1, 1, T, T], True where a row sees a key: causal, no image key, but every row itself (a row
    that sees nothing would turn into NaN; nobody reads those of the image)."""
    length = len(is_image_T)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((causal & ~is_image_T) | torch.eye(length, dtype=torch.bool))[None, None]


def _last_row_attention(
    decoder: Any, index: int, last_BD: torch.Tensor, position_B1: torch.Tensor, cache: Any
) -> torch.Tensor:
    """[B, R] attention probabilities of the last row in layer ``index``, averaged over heads.

    Args:
        last_BD: the last row as it entered that layer, whose keys are in the cache.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    layer = decoder.layers[index]
    attention = layer.self_attn
    normed_B1D = layer.input_layernorm(last_BD)[:, None]
    query = attention.q_proj(normed_B1D).view(len(last_BD), 1, -1, attention.head_dim)
    query = query.transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, *decoder.rotary_emb(normed_B1D, position_B1))
    keys = repeat_kv(cache.layers[index].keys, attention.num_key_value_groups)
    scores = (query @ keys.transpose(2, 3))[:, :, 0] * attention.scaling
    return scores.float().softmax(-1).mean(1)


def _rows(is_image_BR: torch.Tensor, scores_BR: torch.Tensor | None, keep: int) -> torch.Tensor:
    """[B, R'] rows that stay: all text rows and the ``keep`` best-scored image rows, in order."""
    alive = ~is_image_BR
    if keep:
        assert scores_BR is not None
        best = scores_BR.masked_fill(~is_image_BR, -1.0).topk(keep, 1).indices
        alive = alive.scatter(1, best, True)
    return alive.nonzero()[:, 1].view(len(alive), -1)
