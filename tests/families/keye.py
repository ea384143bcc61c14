"""Keye-VL and Keye-VL 1.5: Qwen3 with M-RoPE behind a SigLIP that takes pictures of their own size.

transformers has no class for them: tower and projector are drawn here under the layout's names, and the language
model alone is the reference, from the embeddings and positions that vLLM made. Such a checkpoint brings its
configuration and processor as code; these are ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRRotaryEmbedding

from tests.families.making import (
    Checkpoint,
    drawn,
    fill,
    linear,
    norm,
    text_settings,
    tokenizer,
    tower_settings,
    write_weights,
)

PATCH, SIDE, WIDTH = 14, 112, 64
PACKED = 32768
"""Rows of a table that vLLM's tower has and does not read where positions are interpolated."""

CONFIGURATION = """
from transformers import PretrainedConfig, Qwen3Config


class KeyeConfig(Qwen3Config):
    model_type = "Keye"

    def __init__(self, vision_config=None, **others):
        super().__init__(**others)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
"""

PROCESSING = '''
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


class KeyeImageProcessor(BaseImageProcessor):
    """Patches [N, 3, P, P], those of a token side by side."""

    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(self, patch_size=14, merge_size=2, size=None, **others):
        super().__init__(**others)
        self.patch_size, self.merge_size = patch_size, merge_size
        self.size = size or {"min_pixels": 28 * 28, "max_pixels": 200 * 28 * 28}

    def preprocess(self, images, **_):
        rows, grids, size = [], [], self.patch_size
        for image in images if isinstance(images, (list, tuple)) else [images]:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            high, wide = pixels.shape[1] // size, pixels.shape[2] // size
            patches = pixels.view(3, high, size, wide, size).permute(1, 3, 0, 2, 4)
            rows.append(patches.reshape(-1, 3, size, size))
            grids.append([1, high, wide])
        return BatchFeature({"pixel_values": torch.cat(rows), "image_grid_thw": torch.tensor(grids)})


class KeyeProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token, video_token = "<|image_pad|>", "<|video_pad|>"

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text=None, images=None, videos=None, return_tensors=None, **_):
        found = dict(self.tokenizer(text, return_tensors="pt"))
        if images:
            found |= self.image_processor.preprocess(images)
        return BatchFeature(found)
'''


def _weights(hidden: int, second: bool) -> dict[str, Any]:
    """Tower and projector; the second layout norms four patches at once."""
    tower = hf.SiglipVisionModel(
        hf.SiglipVisionConfig(
            **tower_settings(image_size=SIDE, patch_size=PATCH, vision_use_head=False)
        )
    )
    fill(tower, 3)
    weights = {
        "visual.vision_model." + name.removeprefix("vision_model."): value
        for name, value in tower.state_dict().items()
        if "head." not in name
    }
    shapes = {
        **norm("mlp_AR.pre_norm", (4 if second else 1) * WIDTH),
        **linear("mlp_AR.linear_1", 4 * WIDTH, 4 * WIDTH),
        **linear("mlp_AR.linear_2", hidden, 4 * WIDTH),
        "visual.vision_model.embeddings.packing_position_embedding.weight": (PACKED, WIDTH),
    }
    return weights | drawn(shapes, 4)


def _write(made: Any, vocab: dict[str, int], architecture: str, model: Any, where: Path) -> None:
    second = architecture.startswith("KeyeVL1_5")
    weights = model.state_dict() | _weights(model.config.hidden_size, second)
    write_weights(weights, where / "model.safetensors")
    config = model.config.to_dict() | dict(
        architectures=[architecture],
        model_type="Keye",
        auto_map={"AutoConfig": "configuration_keye.KeyeConfig"},
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_config=tower_settings(
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=3,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            spatial_merge_size=2,
        ),
        torch_dtype="float32",
    )
    config.pop("dtype", None)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_keye.py").write_text(CONFIGURATION)
    (where / "processing_keye.py").write_text(PROCESSING)
    made.save_pretrained(where)
    image = dict(
        image_processor_type="KeyeImageProcessor",
        processor_class="KeyeProcessor",
        auto_map={
            "AutoProcessor": "processing_keye.KeyeProcessor",
            "AutoImageProcessor": "processing_keye.KeyeImageProcessor",
        },
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def qwen3_with_mrope(vocab: Mapping[str, int], head: int, section: Sequence[int]) -> Any:
    """transformers has no Qwen3 with M-RoPE: its own, with PaddleOCR-VL's.

    Args:
        section: pairs of a head's numbers that turn with time, height and width.
    """
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=list(section))
    config = hf.Qwen3Config(**text_settings(vocab, head_dim=head, rope_parameters=rope))
    model = hf.Qwen3ForCausalLM(config)
    model.model.rotary_emb = PaddleOCRRotaryEmbedding(config)
    return model


def _keye(architecture: str) -> Checkpoint:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    made, vocab = tokenizer(marks)
    return Checkpoint(
        model=qwen3_with_mrope(vocab, 32, (4, 6, 6)),
        processor=None,
        vocab=vocab,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, vocab, architecture),
    )


def keye_vl() -> Checkpoint:
    return _keye("KeyeForConditionalGeneration")


def keye_vl_1_5() -> Checkpoint:
    return _keye("KeyeVL1_5ForConditionalGeneration")
