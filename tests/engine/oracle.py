"""What the engine must produce: greedy decoding with image rows removed, float32, no cache.

Runs Hugging Face's modules and knows nothing of vLLM. Two formulations that share only the weights:
`forward_removed` walks the decoder layers and drops the image rows after layer c-1;
`forward_masked` runs the model's own forward and hides image keys from layer c on.

Shapes: T tokens (prompt, placeholders expanded, then output), R rows left, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

HIDDEN = torch.finfo(torch.float32).min

Model: TypeAlias = "LlavaForConditionalGeneration | LlavaNextForConditionalGeneration"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it; `is_image_T` comes from the prompt alone, never from generated ids."""

    ids: tuple[int, ...]
    is_image_T: tuple[bool, ...]
    pixels: torch.Tensor | None
    """Images x 3 x height x width, with tiles images x tiles x 3 x height x width; or None."""
    sizes: torch.Tensor | None = None
    """Images x 2, height and width in pixels; only where pictures are tiled."""


@dataclass(frozen=True)
class OracleOutput:
    """A greedy answer. `logprobs[t]` is token t's; `gaps[t]` how far it leads the runner-up, in logprob."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float, ...]


@functools.lru_cache(maxsize=8)
def load(model_dir: Path) -> tuple[Model, Any]:
    """The checkpoint in float32 with plain attention, and its processor; a missing or stray weight is an error."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(model_dir)


def num_layers(model_dir: Path) -> int:
    """Number of decoder layers, which is also the cliff that means baseline."""
    return load(model_dir)[0].config.text_config.num_hidden_layers


def encode(model_dir: Path, prompt: str, images: Sequence[Image.Image] = ()) -> Prompt:
    """Tokenise, expand each ``<image>`` and preprocess the pictures."""
    model, processor = load(model_dir)
    batch = processor(text=prompt, images=list(images) or None, return_tensors="pt")
    ids = tuple(batch["input_ids"][0].tolist())
    image_id = model.config.image_token_id
    is_image = tuple(i == image_id for i in ids)
    return Prompt(ids, is_image, batch.get("pixel_values"), batch.get("image_sizes"))


def embed(model: Model, prompt: Prompt, output: Sequence[int]) -> torch.Tensor:
    """Embeddings 1 x T x D of prompt and output, projected image features at the placeholders."""
    ids_T = torch.tensor([*prompt.ids, *output])
    hidden_TD = model.get_input_embeddings()(ids_T)
    if prompt.pixels is not None:
        at = torch.tensor(prompt.is_image_T).nonzero()[:, 0]
        hidden_TD[at] = torch.cat(image_features(model, prompt))
    return hidden_TD[None]


@functools.lru_cache(maxsize=8)
def image_features(model: Model, prompt: Prompt) -> list[torch.Tensor]:
    """Per image its projected features, tokens x D; not to be written to."""
    if prompt.pixels is None:
        return []
    config = model.config
    features = model.get_image_features(
        prompt.pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        **({} if prompt.sizes is None else {"image_sizes": prompt.sizes}),
    )
    return list(features.pooler_output)


@functools.lru_cache(maxsize=8)
def _tower(model: Model, prompt: Prompt) -> list[tuple[torch.Tensor, ...]]:
    """Per picture the attention of every layer of the tower, tiles x heads x rows x rows."""
    pictures = prompt.pixels if prompt.sizes is not None else prompt.pixels.unsqueeze(1)  # type: ignore[union-attr]
    return [model.model.vision_tower(one, output_attentions=True).attentions for one in pictures]


def tower_attention(
    model: Model, prompt: Prompt, received: bool, layer: int | None = None
) -> list[torch.Tensor]:
    """Per image a score of each token, in the tower's layer whose output the decoder gets, averaged over heads.

    What the class token gives it, or what the tower's rows that are tokens give it on average. Of tiles, by tile; the
    tokens that end rows have infinitely much.

    Args:
        layer: another one of the tower.
    """
    if prompt.pixels is None:
        return []
    layer = model.config.vision_feature_layer if layer is None else layer
    first = 1 if model.config.vision_feature_select_strategy == "default" else 0
    scores = []
    for attention in _tower(model, prompt):
        weights = attention[layer]
        asking = weights[:, :, first:] if received else weights[:, :, :1]
        scores.append(asking[..., first:].mean((1, 2)))
    return _packed(model, prompt, scores, torch.inf)


def tower_tiles(model: Model, prompt: Prompt, tokens: int) -> list[list[int]]:
    """Per image the tile that each token is of, -1 of those that end rows.

    Args:
        tokens: of a tile.
    """
    if prompt.pixels is None:
        return []
    counts = [1] * len(prompt.pixels) if prompt.sizes is None else [*map(len, prompt.pixels)]
    tiles = [torch.arange(count)[:, None].expand(-1, tokens).float() for count in counts]
    return [found.int().tolist() for found in _packed(model, prompt, tiles, -1)]


def _packed(
    model: Model, prompt: Prompt, values: list[torch.Tensor], end: float
) -> list[torch.Tensor]:
    """Per image [N] from [tiles, patches]: as its tokens are put together, ``end`` where a row ends."""
    if prompt.sizes is None:
        return [value[0] for value in values]
    packed, _ = model.model.pack_image_features(
        [value[..., None] for value in values],
        prompt.sizes,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_newline=torch.tensor([end]),
    )
    return [value[:, 0] for value in packed]


def causal(rows: int) -> torch.Tensor:
    """Additive mask 1 x 1 x rows x rows; removing rows keeps their order, so causality is by rank."""
    return torch.full((rows, rows), HIDDEN).triu(1)[None, None]


@torch.inference_mode()
def forward_removed(
    model_dir: Path, prompt: Prompt, output: Sequence[int], cliff: int
) -> torch.Tensor:
    """Logits R x V of the rows left after the last layer (text rows; all rows if `cliff` is the number of layers)."""
    model, _ = load(model_dir)
    decoder = model.model.language_model
    hidden = embed(model, prompt, output)
    positions = torch.arange(hidden.shape[1])[None]
    is_text_T = ~torch.tensor([*prompt.is_image_T, *[False] * len(output)])
    for index, layer in enumerate(decoder.layers):
        if index == cliff:
            hidden, positions = hidden[:, is_text_T], positions[:, is_text_T]
        hidden = layer(
            hidden,
            attention_mask=causal(hidden.shape[1]),
            position_ids=positions,
            position_embeddings=decoder.rotary_emb(hidden, positions),
        )
    return model.lm_head(decoder.norm(hidden))[0]


@torch.inference_mode()
def forward_masked(
    model_dir: Path, prompt: Prompt, output: Sequence[int], cliff: int
) -> torch.Tensor:
    """Logits T x V with image keys hidden from layer `cliff` on, by the model's own forward.

    An image row keeps seeing itself: nobody reads it, but a row without any key would turn into NaN.
    """
    model, _ = load(model_dir)
    full = causal(len(prompt.ids) + len(output))
    is_image_T = torch.tensor([*prompt.is_image_T, *[False] * len(output)])
    past = full.masked_fill(is_image_T & ~torch.eye(len(is_image_T), dtype=torch.bool), HIDDEN)

    def choose(index: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "attention_mask": full if index < cliff else past}

    hooks = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs, index=index: (args, choose(index, kwargs)),
            with_kwargs=True,
        )
        for index, layer in enumerate(model.model.language_model.layers)
    ]
    try:
        return model(inputs_embeds=embed(model, prompt, output), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def _logprobs_after(
    model_dir: Path, prompt: Prompt, output: Sequence[int], cliff: int
) -> torch.Tensor:
    """Next-token logprobs (len(output) + 1) x V: row t is the distribution of output token t."""
    logits = forward_removed(model_dir, prompt, output, cliff)
    return logits[logits.shape[0] - len(output) - 1 :].log_softmax(-1)


def _only(logprobs: torch.Tensor, allowed: Sequence[int] | None) -> torch.Tensor:
    if allowed is None:
        return logprobs
    out = torch.full_like(logprobs, -torch.inf)
    out[..., list(allowed)] = logprobs[..., list(allowed)]
    return out


def check_greedy(
    model_dir: Path,
    prompt: str,
    images: Sequence[Image.Image],
    cliff: int | None,
    token_ids: Sequence[int],
    allowed: Sequence[int] | None = None,
) -> OracleOutput:
    """The oracle's greedy answer as far as it agrees with `token_ids`, and one token beyond a disagreement.

    One forward over prompt and answer: row t is right as long as all tokens before t are, so `token_ids` is the greedy
    answer exactly if the result's `token_ids` equal it. Same result as `generate`, a forward per answer.
    """
    encoded = encode(model_dir, prompt, images)
    depth = num_layers(model_dir) if cliff is None else cliff
    logprobs = _logprobs_after(model_dir, encoded, token_ids[:-1], depth)
    return compare(encoded, logprobs, token_ids, allowed)


def compare(
    encoded: Prompt,
    logprobs: torch.Tensor,
    token_ids: Sequence[int],
    allowed: Sequence[int] | None = None,
) -> OracleOutput:
    """The greedy answer by next-token logprobs (tokens x V), up to one token beyond a disagreement."""
    top = _only(logprobs, allowed).topk(2)
    best = top.indices[:, 0].tolist()
    same = next(
        (t for t, pair in enumerate(zip(best, token_ids, strict=True)) if pair[0] != pair[1]), None
    )
    count = len(token_ids) if same is None else same + 1
    return OracleOutput(
        encoded.ids,
        tuple(best[:count]),
        tuple(logprobs[range(count), best[:count]].tolist()),
        tuple((top.values[:count, 0] - top.values[:count, 1]).tolist()),
    )


@functools.lru_cache(maxsize=4096)
def _generate(
    model_dir: Path, prompt: Prompt, cliff: int, max_tokens: int, allowed: Any
) -> OracleOutput:
    tokens: list[int] = []
    logprobs: list[float] = []
    gaps: list[float] = []
    while len(tokens) < max_tokens:
        row_V = _logprobs_after(model_dir, prompt, tokens, cliff)[-1]
        top = _only(row_V, allowed).topk(2)
        tokens.append(int(top.indices[0]))
        logprobs.append(float(row_V[tokens[-1]]))
        gaps.append(float(top.values[0] - top.values[1]))
    return OracleOutput(prompt.ids, tuple(tokens), tuple(logprobs), tuple(gaps))


def generate(
    model_dir: Path,
    prompt: str,
    images: Sequence[Image.Image] = (),
    cliff: int | None = None,
    max_tokens: int = 32,
    allowed: Sequence[int] | None = None,
) -> OracleOutput:
    """Greedy answer of `max_tokens` tokens (end-of-text ignored), the whole forward anew for every token.

    `prompt` has one ``<image>`` per picture. `cliff` None is the baseline. `allowed` restricts the choice to some token
    ids (logprobs stay those of the full distribution, as in vLLM).
    """
    depth = num_layers(model_dir) if cliff is None else cliff
    return _generate(
        model_dir,
        encode(model_dir, prompt, images),
        depth,
        max_tokens,
        tuple(allowed) if allowed else None,
    )
