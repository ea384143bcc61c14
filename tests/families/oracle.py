"""What an answer must be: Hugging Face's own forward with image keys hidden from layer ``cliff`` on.

Where layers keep a state in the place of keys, image rows leave the hidden states instead: `leaving_rows`.

Pre-hooks on its decoder layers change nothing but the attention mask, so position tables and injected
features are transformers' own, and windows up to the cliff. Past it a window counts the tokens that are
left. An image row keeps seeing itself: nobody reads it, but a row without any key would turn into NaN.

Shapes: T tokens (prompt, then answer), V vocabulary. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from tests.families import leaving_rows
from tests.families.making import Checkpoint

HIDDEN = torch.finfo(torch.float32).min
TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
"""Inputs with a value per prompt token, 0 for text."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it: ids and pictures, or embeddings [T, H]."""

    ids: list[int]
    is_image_T: torch.Tensor
    inputs: dict[str, Any] | None = None
    """What transformers' processor makes."""
    embeddings_TH: torch.Tensor | None = None
    """What vLLM's tower and merge made; positions and injections below are vLLM's too then."""
    positions: torch.Tensor | None = None
    """[T], M-RoPE [3, T]."""
    injected: tuple[torch.Tensor, ...] = ()
    """[T, H] each, added after the first layers."""


def encode(checkpoint: Checkpoint, text: str, pictures: Sequence[Image.Image]) -> Prompt:
    """Tokenise, expand what stands for pictures, and preprocess them."""
    found = checkpoint.processor(
        text=[text],
        images=[list(pictures)] if checkpoint.nested else list(pictures),
        return_tensors="pt",
    )
    inputs = {
        name: value.float() if value.is_floating_point() else value  # some give pixels in bfloat16
        for name, value in found.items()
        if name not in checkpoint.unused
    }
    ids = inputs["input_ids"][0].tolist()
    return Prompt(ids, is_image(checkpoint, ids), inputs=inputs)


def is_image(checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Which tokens of a prompt are a picture's, by id: a prompt is text of our own."""
    return torch.isin(torch.tensor(ids), torch.tensor(checkpoint.image_ids))


@torch.inference_mode()
def logprobs(
    checkpoint: Checkpoint, prompt: Prompt, answer: Sequence[int], cliff: int, late: bool = False
) -> torch.Tensor:
    """Logprobs (len(answer) + 1) x V: row t is the distribution of answer token t.

    Args:
        late: the keys are hidden from the rows of the answer alone.
    """
    decoder = checkpoint.decoder(checkpoint.model)
    hide_T = torch.cat([prompt.is_image_T, torch.zeros(len(answer), dtype=torch.bool)])
    first = len(prompt.ids) if late else 0
    changed: Any = _masked(checkpoint, cliff, hide_T, first)
    if checkpoint.recurrent:
        stay = (~hide_T).nonzero()[:, 0]
        changed = leaving_rows.leaving(decoder, lambda layer, _: stay if layer == cliff else None)
    with changed:
        logits = forward(checkpoint, prompt, answer)
    return logits[len(prompt.ids) - 1 :].log_softmax(-1)


def forward(checkpoint: Checkpoint, prompt: Prompt, answer: Sequence[int]) -> torch.Tensor:
    """Logits T x V of transformers' own forward over prompt and answer."""
    model, decoder = checkpoint.model, checkpoint.decoder(checkpoint.model)
    if prompt.embeddings_TH is None:
        assert prompt.inputs is not None
        logits: torch.Tensor = model(**_longer(prompt.inputs, answer), use_cache=False).logits[0]
        return logits
    inputs = _from_embeddings(model, prompt, answer)
    if checkpoint.mutual is not None:
        mask = mutual_mask(checkpoint.mutual(prompt.ids), inputs["position_ids"].shape[-1])
        kinds = set(getattr(decoder.config, "layer_types", None) or ())
        # A model whose layers are of several kinds takes a mask for each.
        inputs["attention_mask"] = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
    hidden = decoder(**inputs, use_cache=False)
    found: torch.Tensor = model.get_output_embeddings()(hidden.last_hidden_state[0])
    return found


def mutual_mask(ranges: Sequence[tuple[int, int]], length: int) -> torch.Tensor:
    """Mask 1 x 1 x T x T of rows that see what is before them, and all of the range that they are in."""
    seen_TT = torch.ones(length, length, dtype=torch.bool).tril()
    for start, stop in ranges:
        seen_TT[start:stop, start:stop] = True
    return torch.zeros(length, length).masked_fill(~seen_TT, HIDDEN)[None, None]


def _from_embeddings(model: Any, prompt: Prompt, answer: Sequence[int]) -> dict[str, Any]:
    """Inputs of a decoder of transformers from what vLLM handed to its own."""
    assert prompt.embeddings_TH is not None and prompt.positions is not None
    words = model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
    following = prompt.positions.max() + 1 + torch.arange(len(answer))
    positions = torch.cat(
        [prompt.positions, following.expand(*prompt.positions.shape[:-1], len(answer))], -1
    )
    inputs = {
        "inputs_embeds": torch.cat([prompt.embeddings_TH, words])[None],
        "position_ids": positions[None] if positions.dim() == 1 else positions[:, None],
        "attention_mask": torch.ones(1, positions.shape[-1], dtype=torch.long),
    }
    if prompt.injected:
        text = torch.zeros(len(answer), dtype=torch.bool)
        inputs["visual_pos_masks"] = torch.cat([prompt.is_image_T, text])[None]
        inputs["deepstack_visual_embeds"] = [part[prompt.is_image_T] for part in prompt.injected]
    return inputs


def _longer(inputs: dict[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in TYPES:
        if name in inputs:
            text = torch.zeros(1, len(answer), dtype=inputs[name].dtype)
            longer[name] = torch.cat([inputs[name], text], 1)
    return longer


def without(
    mask_11TT: torch.Tensor, gone_T: torch.Tensor, window: int | None, local: int | None = None
) -> torch.Tensor:
    """A layer's mask with keys hidden from every row but their own.

    Args:
        window: how many of the tokens that are left a row sees, its own included; None: all of them.
        local: of how many of them a chunk is that a row sees itself in; None: they are not divided.
    """
    if local is not None:
        chunk_T = ((~gone_T).cumsum(0) - 1) // local
        other_TT = chunk_T[:, None] != chunk_T[None, :]
        later_TT = torch.ones_like(other_TT).triu(1)
        mask_11TT = torch.zeros_like(mask_11TT).masked_fill(other_TT | later_TT, HIDDEN)
    if window is not None:
        rank_T = (~gone_T).cumsum(0)
        far_TT = rank_T[:, None] - rank_T[None, :] >= window
        # What a row sees of later tokens is of its own picture, which no window is narrower than.
        later_TT = torch.ones_like(far_TT).triu(1) & (mask_11TT < 0)
        mask_11TT = torch.zeros_like(mask_11TT).masked_fill(far_TT | later_TT, HIDDEN)
    return mask_11TT.masked_fill(gone_T & ~torch.eye(len(gone_T), dtype=torch.bool), HIDDEN)


@contextmanager
def _masked(checkpoint: Checkpoint, cliff: int, gone_T: torch.Tensor, first: int) -> Iterator[None]:
    layers = checkpoint.decoder(checkpoint.model).layers

    def hide(index: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            assert mask.dtype == torch.float32 and mask.dim() == 4, "attention must be eager"
            seen = checkpoint.windows.get(index), checkpoint.local.get(index)
            hidden = without(mask, gone_T, *seen)
            hidden = torch.cat([mask[..., :first, :], hidden[..., first:, :]], -2)
            return args, {**kwargs, "attention_mask": hidden}

        return hook

    hooks = [
        layer.register_forward_pre_hook(hide(index), with_kwargs=True)
        for index, layer in enumerate(layers)
        if index >= cliff
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
