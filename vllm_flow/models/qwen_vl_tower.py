"""Qwen-VL's tower: a ViT whose patches become a fixed number of tokens by cross-attention.

Named as the published checkpoint is, under ``transformer.visual``. The resampler is vLLM's
(``Resampler2`` in ``vllm/model_executor/layers/resampler.py``). Every worker holds the whole tower.

Shapes: B pictures, P patches, W the tower's width, Q tokens of a picture, H the decoder's width.
"""

from __future__ import annotations

from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.resampler import Resampler2, get_abs_pos

from vllm_flow.models.qwen_vl_config import QUERIES

POSITIONS = 256
"""Positions that are learned, a square; a picture of another number of patches interpolates them."""
HEAD = 128
"""Width of a head of the resampler."""

Norm = partial(nn.LayerNorm, eps=1e-6)


class TowerAttention(nn.Module):
    """Every patch attends to every patch; queries, keys and values lie side by side head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BPW: torch.Tensor) -> torch.Tensor:
        split = self.in_proj(x_BPW).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(*split.unbind(-2))
        return self.out_proj(found.transpose(1, 2).flatten(2))


class TowerBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = Norm(width), Norm(width)
        self.attn = TowerAttention(width, heads)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)}
        )

    def forward(self, x_BPW: torch.Tensor) -> torch.Tensor:
        x_BPW = x_BPW + self.attn(self.ln_1(x_BPW))
        inner = nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x_BPW)))
        return x_BPW + self.mlp["c_proj"](inner)


class QwenVLTower(nn.Module):
    """Pixels [B, 3, side, side] -> tokens [B, Q, H].

    Args:
        width: of the ViT. Others as in the ``visual`` of ``config.json``, with ``output_dim`` H.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        output_dim: int,
        n_queries: int = QUERIES,
        **others: Any,
    ) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, width))
        self.ln_pre = Norm(width)
        hidden = int(width * mlp_ratio)
        blocks = nn.ModuleList(TowerBlock(width, heads, hidden) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.proj = nn.Parameter(torch.empty(output_dim, output_dim))
        # vLLM's makes its positions from numpy: on the CPU, in float32.
        self.attn_pool = Resampler2(
            grid_size=isqrt(n_queries),
            embed_dim=output_dim,
            num_heads=output_dim // HEAD,
            kv_dim=width,
            norm_layer=Norm,
            do_post_projection=False,
        ).to(device=self.proj.device, dtype=self.proj.dtype)
        self.ln_post = Norm(output_dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels.to(self.conv1.weight)).flatten(2).transpose(1, 2)
        x_BPW = self.ln_pre(patches + get_abs_pos(self.positional_embedding, self.grid))
        for block in self.transformer["resblocks"]:
            x_BPW = block(x_BPW)
        return self.ln_post(self.attn_pool(x_BPW)) @ self.proj
