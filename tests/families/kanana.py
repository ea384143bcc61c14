"""Kanana-V: Llama behind Qwen2-VL's tower, and a projector that vLLM builds of timm's parts: a small one stands for it.

transformers has no class for the layout: the language model alone is the reference, from the embeddings that vLLM made.
Such a checkpoint brings its configuration and processor as code; these are ours.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from tests.families.making import (
    Checkpoint,
    drawn,
    fill,
    linear,
    text_settings,
    tokenizer,
    write_weights,
)

PATCH, WIDTH = 14, 64
UNIT = 2 * PATCH
MARKS = ("<|eot|>", "<|media|>", "<image>")
"""The model takes the token behind that of the end for a picture's; prompts have the last one."""
TIMM = {
    "timm.layers": ("LayerNorm2d",),
    "timm.layers.pos_embed": ("resample_abs_pos_embed",),
    "timm.models.regnet": ("RegStage",),
}
CONFIGURATION = """
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig


class KananaConfig(PretrainedConfig):
    model_type = "kanana-1.5-v"

    def __init__(self, vision_config=None, projector_config=None, text_config=None, **others):
        self.vision_config = Qwen2VLVisionConfig(**(vision_config or {}))
        self.projector_config = PretrainedConfig(**(projector_config or {}))
        self.text_config = LlamaConfig(**(text_config or {}))
        super().__init__(**others)
"""
PROCESSING = '''
import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


def smart_resize(height, width, factor, min_pixels, max_pixels):
    while height * width > max_pixels:
        height, width = height // 2, width // 2
    return max(1, height // factor) * factor, max(1, width // factor) * factor


class KananaImageProcessor(BaseImageProcessor):
    """Patches [N, 3 x P x P] of one picture, those of a token side by side."""

    model_input_names = ["pixel_values"]

    def __init__(self, patch_size=14, min_pixels=28 * 28, max_pixels=200 * 28 * 28, **others):
        super().__init__(**others)
        self.patch_size, self.min_pixels, self.max_pixels = patch_size, min_pixels, max_pixels

    def __call__(self, image, **_):
        size = self.patch_size
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        high, wide = pixels.shape[1] // size, pixels.shape[2] // size
        parts = pixels.view(3, high // 2, 2, size, wide // 2, 2, size)
        rows = parts.permute(1, 4, 2, 5, 0, 3, 6).reshape(high * wide, -1)
        meta = {"vision_grid_thw": [1, high, wide], "image_token_thw": [1, high // 2, wide // 2]}
        return {"pixel_values": rows, "image_meta": meta}


class KananaProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)
'''


class Projector(nn.Module):
    """In the place of vLLM's module, with what its model reads of that: 2 x 2 patches a token."""

    def __init__(self, config: Any, num_input_tokens: int) -> None:
        super().__init__()
        self.merge_size = config.merge_size
        width = config.encoder_hidden_size * self.merge_size**2
        self.readout = nn.Linear(width, config.output_hidden_size)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> dict[str, torch.Tensor]:
        merged = patches.view(-1, self.readout.in_features)
        return {"last_hidden_state": self.readout(merged).tanh()}


def _have_timm() -> None:
    """vLLM's module asks for it when it is imported; what it would build of it is not built."""
    if find_spec("timm") is not None:
        return
    for name, parts in TIMM.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        vars(module).update(dict.fromkeys(parts, nn.Identity))


def _write(made: Any, model: Any, where: Path) -> None:
    sizes = dict(depth=2, embed_dim=WIDTH, hidden_size=WIDTH, num_heads=2, mlp_ratio=2)
    tower = dict(sizes, patch_size=PATCH, temporal_patch_size=1, spatial_merge_size=2)
    vision = Qwen2VisionTransformerPretrainedModel(
        hf.Qwen2VLConfig(vision_config=tower).vision_config
    )
    fill(vision, 3)
    hidden = model.config.hidden_size
    weights = drawn(linear("abstractor.readout", hidden, 4 * WIDTH), 4)
    for name, value in vision.state_dict().items():
        if not name.startswith("merger"):
            weights[f"vision_model.{name}"] = value
    for name, value in model.state_dict().items():
        weights[f"language_model.{name}"] = value
    write_weights(weights, where / "model.safetensors")
    config = dict(
        architectures=["KananaVForConditionalGeneration"],
        model_type="kanana-1.5-v",
        auto_map={"AutoConfig": "configuration_kanana.KananaConfig"},
        vision_config=tower,
        projector_config=dict(
            encoder_hidden_size=WIDTH,
            output_hidden_size=hidden,
            merge_size=2,
            feature_layer_index=-1,
        ),
        text_config=model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        torch_dtype="float32",
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_kanana.py").write_text(CONFIGURATION)
    (where / "processing_kanana.py").write_text(PROCESSING)
    made.save_pretrained(where)
    image = dict(
        image_processor_type="KananaImageProcessor",
        processor_class="KananaProcessor",
        auto_map={
            "AutoProcessor": "processing_kanana.KananaProcessor",
            "AutoImageProcessor": "processing_kanana.KananaImageProcessor",
        },
        patch_size=PATCH,
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def kanana_v() -> Checkpoint:
    _have_timm()
    made, vocab = tokenizer(MARKS)
    config = hf.LlamaConfig(**text_settings(vocab, eos_token_id=vocab["<|eot|>"]))
    return Checkpoint(
        model=hf.LlamaForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<|media|>"],),
        sizes=((5 * UNIT, 8 * UNIT), (6 * UNIT, 4 * UNIT)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made),
        shrunk={"kanana_v.DynamicCAbstractor": lambda _: Projector},
    )
