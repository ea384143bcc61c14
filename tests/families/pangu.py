"""OpenPangu-VL: a decoder of Qwen2's kind with M-RoPE, behind a tower that vLLM runs on accelerators alone.

transformers has no class for the layout: its Qwen2, with PaddleOCR-VL's M-RoPE, is the reference, from the embeddings
that vLLM made. A small tower stands for the published one. Such a checkpoint brings its configuration class as code;
this one is ours.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRRotaryEmbedding

from tests.families.making import Checkpoint, drawn, linear, text_settings, tokenizer, write_weights

PATCH, WIDTH = 14, 64
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CONFIGURATION = """
from transformers import PretrainedConfig


class PanguConfig(PretrainedConfig):
    model_type = "openpangu_vl"

    def __init__(self, vision_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**others)
"""


class Tower(nn.Module):
    """In the place of vLLM's, with what its model reads of that: 2 x 2 patches a token."""

    def __init__(self, hidden_size: int, **_settings: Any) -> None:
        super().__init__()
        self.spatial_merge_size = 2
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.merge = nn.Linear(4 * WIDTH, hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.patches.weight.dtype

    def forward(self, pixels: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        patches = self.patches(pixels.to(self.dtype)).tanh()
        found: torch.Tensor = self.merge(patches.view(-1, 4 * WIDTH))
        return found


def _write(saved: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    hidden = model.config.hidden_size
    shapes = linear("model.visual.patches", WIDTH, 3 * PATCH**2)
    shapes |= linear("model.visual.merge", hidden, 4 * WIDTH)
    weights = drawn(shapes, 3)
    for name, value in model.state_dict().items():
        name = name.replace("model.", "model.language_model.", 1)
        weights[name] = value
    write_weights(weights, where / "model.safetensors")
    config = model.config.to_dict() | dict(
        architectures=["OpenPanguVLForConditionalGeneration"],
        model_type="openpangu_vl",
        auto_map={"AutoConfig": "configuration_openpangu_vl.PanguConfig"},
        qkv_bias=True,
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_config=dict(
            out_hidden_size=hidden,
            in_channels=3,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=1,
            tokens_per_second=2,
        ),
        torch_dtype="float32",
    )
    for name in ("dtype", "layer_types", "sliding_window"):
        config.pop(name, None)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_openpangu_vl.py").write_text(CONFIGURATION)
    saved.save_pretrained(where)


def openpangu_vl() -> Checkpoint:
    made, vocab = tokenizer(MARKS, dict(image_token=MARKS[2], video_token=MARKS[3]))
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    config = hf.Qwen2Config(**text_settings(vocab, rope_parameters=rope))
    config.head_dim = 32
    model = hf.Qwen2ForCausalLM(config)
    model.model.rotary_emb = PaddleOCRRotaryEmbedding(config)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    images = dict(patch_size=PATCH, size=size, temporal_patch_size=1)
    saved = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**images),
        tokenizer=made,
        video_processor=hf.Qwen3VLVideoProcessor(**images),
    )
    return Checkpoint(
        model=model,
        processor=None,
        vocab=vocab,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, saved, vocab),
        shrunk={"openpangu_vl.OpenPanguVisionTransformer": lambda _: Tower},
    )
