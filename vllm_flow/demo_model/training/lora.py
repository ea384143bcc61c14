"""The decoder as training sees it: Llama layers with LoRA on their attention projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer W plus (alpha / r) B A; B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def new_llama(config: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    """An untrained ``LlamaModel`` (no head: embeddings are tied)."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel

    skipped = ("model_type", "architectures", "rope_theta")
    llama_config = LlamaConfig(**{k: v for k, v in config.items() if k not in skipped})
    llama_config._attn_implementation = attention
    return LlamaModel(llama_config)


def add_lora(llama: nn.Module, rank: int, alpha: int) -> dict[str, nn.Parameter]:
    """Put LoRA on every attention projection; returns its parameters by name."""
    found = {}
    for number, layer in enumerate(llama.layers):
        for target in LORA_TARGETS:
            adapter = LoraLinear(getattr(layer.self_attn, target), rank, alpha)
            setattr(layer.self_attn, target, adapter)
            found[f"layers.{number}.self_attn.{target}.lora_a"] = adapter.lora_a
            found[f"layers.{number}.self_attn.{target}.lora_b"] = adapter.lora_b
    return found


def cast_weights(llama: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the weights' type and nothing else.

    ``Module.to`` would round the rotary frequencies as well: at position 300 in bfloat16 the fast ones
    are off by a good part of a turn, and vLLM, which does not round them, would run another model.
    """
    for parameter in llama.parameters():
        parameter.data = parameter.data.to(dtype)
    return llama


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without decay over groups that name their peak rate."""
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))
