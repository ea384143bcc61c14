"""Attention as Hugging Face's modules compute it: with image rows removed, and whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from tests.engine import oracle
from tests.engine.oracle import Prompt


@torch.inference_mode()
def attention_removed(
    model_dir: Path, prompt: Prompt, output: Sequence[int], cliff: int
) -> torch.Tensor:
    """Attention L x T x T averaged over heads, as `forward_removed` computes it; 0 where rows or keys are gone."""
    model, _ = oracle.load(model_dir)
    is_text_T = ~torch.tensor([*prompt.is_image_T, *[False] * len(output)])
    with attention_weights(model) as weights:
        oracle.forward_removed(model_dir, prompt, output, cliff)
    full = torch.zeros(len(weights), len(is_text_T), len(is_text_T))
    for layer, weight_HRR in enumerate(weights):
        left = is_text_T if layer >= cliff else torch.ones_like(is_text_T)
        full[layer][left.outer(left)] = weight_HRR.mean(0).flatten()
    return full


@contextmanager
def attention_weights(model: LlavaForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """Each decoder layer's attention, heads x rows x rows, in the order of the layers."""
    weights: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _module, _args, result: weights.append(result[1][0])
        )
        for layer in model.model.language_model.layers
    ]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def attention_full(model_dir: Path, prompt: Prompt, output: Sequence[int]) -> torch.Tensor:
    """Attention L x T x T averaged over heads, by Hugging Face's own `output_attentions=True`."""
    model, _ = oracle.load(model_dir)
    found = model(
        inputs_embeds=oracle.embed(model, prompt, output), use_cache=False, output_attentions=True
    )
    return torch.stack([weight.mean(1)[0] for weight in found.attentions])
