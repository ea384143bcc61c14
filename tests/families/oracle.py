"""What an answer must be: Hugging Face's own forward with image keys hidden from layer ``cliff`` on.

Pre-hooks on its decoder layers change nothing but the attention mask, so position tables, injected
features and windows are transformers' own. An image row keeps seeing itself: nobody reads it, but a
row without any key would turn into NaN.

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

from tests.families.making import Checkpoint

HIDDEN = torch.finfo(torch.float32).min
TYPES = ("mm_token_type_ids", "token_type_ids")
"""Inputs with a value per prompt token, 0 for text."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as transformers' processor makes it."""

    inputs: dict[str, Any]
    is_image_T: torch.Tensor

    @property
    def ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()


def encode(checkpoint: Checkpoint, text: str, pictures: Sequence[Image.Image]) -> Prompt:
    """Tokenise, expand what stands for pictures, and preprocess them."""
    found = checkpoint.processor(
        text=[text],
        images=[list(pictures)] if checkpoint.nested else list(pictures),
        return_tensors="pt",
    )
    inputs = {name: value for name, value in found.items() if name not in checkpoint.unused}
    ids_T = inputs["input_ids"][0]
    return Prompt(inputs, torch.isin(ids_T, torch.tensor(checkpoint.image_ids)))


@torch.inference_mode()
def logprobs(
    checkpoint: Checkpoint, prompt: Prompt, answer: Sequence[int], cliff: int
) -> torch.Tensor:
    """Logprobs (len(answer) + 1) x V: row t is the distribution of answer token t."""
    inputs = _longer(prompt.inputs, answer)
    hide_T = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    hide_T[: len(prompt.is_image_T)] = prompt.is_image_T
    past = hide_T & ~torch.eye(len(hide_T), dtype=torch.bool)
    layers = checkpoint.decoder(checkpoint.model).layers
    with _masked(layers[cliff:], past):
        logits = checkpoint.model(**inputs, use_cache=False).logits[0]
    return logits[len(prompt.is_image_T) - 1 :].log_softmax(-1)


def _longer(inputs: dict[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in TYPES:
        if name in inputs:
            text = torch.zeros(1, len(answer), dtype=inputs[name].dtype)
            longer[name] = torch.cat([inputs[name], text], 1)
    return longer


@contextmanager
def _masked(layers: Sequence[nn.Module], past_TT: torch.Tensor) -> Iterator[None]:
    def hide(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        assert mask.dtype == torch.float32 and mask.dim() == 4, "attention must be eager"
        return args, {**kwargs, "attention_mask": mask.masked_fill(past_TT, HIDDEN)}

    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
