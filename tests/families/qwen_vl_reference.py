"""Qwen-VL as its report and its published checkpoints describe it, in plain torch: what vLLM must compute.

transformers has no class for it. Modules are named as the weights are, so the checkpoint is this one's
``state_dict``. Layers take ``attention_mask`` and give their attention maps, as transformers' do, so that
the oracles can hide keys. Knows neither vLLM nor vllm_flow.

Shapes: B pictures, P patches, W the tower's width, Q tokens of a picture, H the decoder's width, T tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from math import isqrt
from types import SimpleNamespace
from typing import Any

import tiktoken
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

PIECES = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def on_grid(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Positions [n, C] of a square, bicubically at another side."""
    own = isqrt(positions.shape[0])
    square = positions.T.reshape(1, -1, own, own)
    if side != own:
        square = nn.functional.interpolate(
            square, size=(side, side), mode="bicubic", align_corners=False
        )
    return square.flatten(2)[0].T


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


class TowerAttention(nn.Module):
    """A head's query, key and value are next to each other in ``in_proj``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed, found = self.in_proj(x), []
        for head in range(self.heads):
            own = mixed[..., 3 * self.size * head : 3 * self.size * (head + 1)]
            query, key, value = own.split(self.size, -1)
            scores = query @ key.transpose(-1, -2) / self.size**0.5
            found.append(scores.softmax(-1) @ value)
        return self.out_proj(torch.cat(found, -1))


class TowerBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = layer_norm(width), layer_norm(width)
        self.attn = TowerAttention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossAttention(nn.Module):
    """Weights as ``nn.MultiheadAttention`` names them: all queries, then all keys, then all values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        parts = [
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        scores = parts[0] @ parts[1].transpose(-1, -2) / parts[0].shape[-1] ** 0.5
        return self.out_proj((scores.softmax(-1) @ parts[2]).transpose(-2, -3).flatten(-2))


class Resampler(nn.Module):
    """Learned queries look at all patches once; positions go to queries and keys, not to values."""

    def __init__(self, queries: int, width: int, patch_width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(queries, width))
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=False)
        self.attn = CrossAttention(width, width // 128)
        self.ln_q, self.ln_kv = layer_norm(width), layer_norm(width)

    def forward(self, x_BPW: torch.Tensor) -> torch.Tensor:
        seen = self.ln_kv(self.kv_proj(x_BPW))
        where = on_grid(self.pos_embed, isqrt(x_BPW.shape[1]))
        asked = (self.ln_q(self.query) + self.pos_embed).expand(len(seen), -1, -1)
        return self.attn(asked, seen + where, seen)


class Tower(nn.Module):
    def __init__(self, visual: dict[str, Any], queries: int) -> None:
        super().__init__()
        width, out, patch = visual["width"], visual["output_dim"], visual["patch_size"]
        self.side = visual["image_size"] // patch
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(256, width))
        self.ln_pre, self.ln_post = layer_norm(width), layer_norm(out)
        self.transformer = nn.Module()
        hidden = int(width * visual["mlp_ratio"])
        self.transformer.resblocks = nn.ModuleList(
            TowerBlock(width, visual["heads"], hidden) for _ in range(visual["layers"])
        )
        self.attn_pool = Resampler(queries, out, width)
        self.proj = nn.Parameter(torch.empty(out, out))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + on_grid(self.positional_embedding, self.side))
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj


class RootMeanSquare(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def turned(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding of [1, heads, T, d]: the two halves of a head are a number's two parts."""
    length, size = x.shape[-2:]
    rates = base ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(length)[:, None] * rates
    real, imaginary = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.heads, self.base = config["num_attention_heads"], config["rotary_emb_base"]
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        split = [part.unflatten(-1, (self.heads, -1)) for part in self.c_attn(x).chunk(3, -1)]
        query, key, value = (part.transpose(1, 2) for part in split)
        query, key = turned(query, self.base), turned(key, self.base)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + attention_mask
        weights = scores.softmax(-1)
        return self.c_proj((weights @ value).transpose(1, 2).flatten(2)), weights


class GatedMLP(nn.Module):
    """What ``w1`` gives is gated by ``w2``."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"] // 2
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        norm = (config["hidden_size"], config["layer_norm_epsilon"])
        self.ln_1, self.ln_2 = RootMeanSquare(*norm), RootMeanSquare(*norm)
        self.attn, self.mlp = Attention(config), GatedMLP(config)

    @property
    def self_attn(self) -> nn.Module:
        """Where the oracles look for attention maps."""
        return self.attn

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), attention_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any], queries: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.h = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.ln_f = RootMeanSquare(config["hidden_size"], config["layer_norm_epsilon"])
        self.visual = Tower(config["visual"], queries)

    @property
    def layers(self) -> nn.ModuleList:
        return self.h


class QwenVLReference(nn.Module):
    """The whole model, for one prompt at a time."""

    def __init__(self, config: dict[str, Any], queries: int = 256) -> None:
        super().__init__()
        self.start = config["visual"]["image_start_id"]
        self.transformer = Decoder(config, queries)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def set_attn_implementation(self, name: str) -> None:
        """There is one."""

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        inner = self.transformer
        hidden = inner.wte(input_ids)
        if pixel_values is not None:
            opened = (input_ids[0] == self.start).nonzero()[:, 0].tolist()
            closed = (input_ids[0] == self.start + 1).nonzero()[:, 0].tolist()
            pictures = inner.visual(pixel_values)
            for first, last, picture in zip(opened, closed, pictures, strict=True):
                hidden[0, first + 1 : last] = picture
        length = input_ids.shape[1]
        mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
        for layer in inner.h:
            hidden = layer(hidden, attention_mask=mask)
        return SimpleNamespace(logits=self.lm_head(inner.ln_f(hidden)))


class ReferenceProcessor:
    """Tokens by tiktoken itself; pictures resized by Pillow through torchvision, as published."""

    def __init__(
        self, ranks: dict[bytes, int], specials: Sequence[str], side: int, queries: int = 256
    ) -> None:
        ids = {name: len(ranks) + index for index, name in enumerate(specials)}
        self.encoding = tiktoken.Encoding(
            "qwen", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=ids
        )
        self.start, self.end, self.pad = (ids[name] for name in ("<img>", "</img>", "<imgpad>"))
        self.queries = queries
        self.transform = transforms.Compose(
            [
                transforms.Resize((side, side), interpolation=InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(
                    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
                ),
            ]
        )

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    def __call__(
        self, text: list[str], images: Sequence[Image.Image], return_tensors: str
    ) -> dict[str, torch.Tensor]:
        found: list[int] = []
        inside = False
        for token in self.encode(text[0]):
            if token == self.end:
                inside = False
            if not inside:
                found.append(token)
            if token == self.start:
                inside = True
                found += [self.pad] * self.queries
        made = {"input_ids": torch.tensor([found])}
        if images:
            pixels = [self.transform(image.convert("RGB")) for image in images]
            made["pixel_values"] = torch.stack(pixels)
        return made
