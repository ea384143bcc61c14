"""OpenVLA: Llama behind two towers, whose tokens stand before the text; answers are words, which stand for actions.

transformers has no class for the layout: the language model alone is the reference, from the embeddings that vLLM made.
vLLM takes its towers from timm, at the published sizes: small ones stand for them.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.families.making import Checkpoint, drawn, linear, text_settings, tokenizer, write_weights

SIDE, PATCH, WIDTH = 224, 14, 32


class Featurizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        return (patches + self.mix(patches).tanh()).contiguous()


class Towers(nn.Module):
    """In the place of vLLM's module, with what its model reads of that."""

    def __init__(self, **_settings: Any) -> None:
        super().__init__()
        self.embed_dim = 2 * WIDTH
        self.dinov2_featurizer = Featurizer()
        self.siglip_featurizer = Featurizer()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        own = self.dinov2_featurizer(pixels[:, :3]), self.siglip_featurizer(pixels[:, 3:])
        return torch.cat(own, -1)


def _write(made: Any, model: Any, where: Path) -> None:
    hidden = model.config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("featurizer", "fused_featurizer"):  # as published
        front = f"vision_backbone.{name}."
        shapes[f"{front}patch_embed.proj.weight"] = (WIDTH, 3, PATCH, PATCH)
        shapes[f"{front}patch_embed.proj.bias"] = (WIDTH,)
        shapes |= linear(f"{front}mix", WIDTH, WIDTH)
    shapes |= linear("projector.fc1", 8 * WIDTH, 2 * WIDTH)
    shapes |= linear("projector.fc2", hidden, 8 * WIDTH)
    shapes |= linear("projector.fc3", hidden, hidden)
    weights = drawn(shapes, 3)
    for name, value in model.state_dict().items():
        weights[f"language_model.{name}"] = value
    write_weights(weights, where / "model.safetensors")
    config = dict(
        architectures=["OpenVLAForActionPrediction"],
        model_type="openvla",
        image_token_index=made.convert_tokens_to_ids("<PAD>"),
        text_config=model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        torch_dtype="float32",
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    made.save_pretrained(where)


def openvla() -> Checkpoint:
    made, vocab = tokenizer(("<PAD>",))
    return Checkpoint(
        model=hf.LlamaForCausalLM(hf.LlamaConfig(**text_settings(vocab))),
        processor=None,
        vocab=vocab,
        image="",
        image_ids=(vocab["<PAD>"],),
        sizes=((SIDE, SIDE), (SIDE, SIDE)),
        single=True,
        options={"limit_mm_per_prompt": {"image": 1}},
        decoder=lambda model: model.model,
        write_ids=lambda text, _: [vocab["<s>"], *made.encode(text)],  # the picture goes behind it
        write=partial(_write, made),
        shrunk={"openvla.PrismaticVisionBackbone": lambda _: Towers},
    )
