"""Kimi-VL: one token per 28 x 28 pixels, around DeepSeek-V3's language model, which stores latent attention.

transformers has no class for the layout: tower and projector are drawn here under the checkpoint's names, and the
language model alone is the reference, from the embeddings that vLLM made. Such a checkpoint brings its
processor and image processor as code; these are ours, as small as vLLM allows.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from safetensors.torch import save_file
from tokenizers import decoders

from tests.families import deepseek
from tests.families.making import (
    Checkpoint,
    drawn,
    linear,
    norm,
    tokenizer,
)

WIDTH, PATCH, GRID = 64, 14, 8
TOWER = dict(
    model_type="moonvit",
    patch_size=PATCH,
    init_pos_emb_height=GRID,
    init_pos_emb_width=GRID,
    num_attention_heads=2,
    num_hidden_layers=2,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    merge_kernel_size=(2, 2),
)
PAD = "<|media_pad|>"
MARKS = ("<|media_start|>", "<|media_content|>", PAD, "<|media_end|>")
PLACE = "<|media_start|> <|media_content|> <|media_pad|> <|media_end|>"

PROCESSING = '''
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


class KimiVLProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token = "<|media_pad|>"

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text=None, images=None, **others):
        return self.image_processor.preprocess(images)


class KimiVLImageProcessor(BaseImageProcessor):
    """Patch by patch, of pictures drawn out to whole tokens."""

    model_input_names = ["pixel_values", "image_grid_hws"]
    patch_size = 14
    merge_kernel_size = (2, 2)
    in_token_limit = 64

    def preprocess(self, images, **others):
        patches, grids, size = [], [], self.patch_size
        for image in images:
            image = image.convert("RGB")
            count = (image.width // size) * (image.height // size)
            scale = min(1.0, (self.in_token_limit / count) ** 0.5)
            image = image.resize(
                [2 * size * -(-int(side * scale) // (2 * size)) for side in image.size]
            )
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            pixels = pixels.float() / 127.5 - 1
            rows, columns = image.height // size, image.width // size
            cut = pixels.unflatten(2, (columns, size)).unflatten(1, (rows, size))
            patches.append(cut.permute(1, 3, 0, 2, 4).flatten(0, 1))
            grids.append([rows, columns])
        return BatchFeature(
            {"pixel_values": torch.cat(patches), "image_grid_hws": torch.tensor(grids)}
        )
'''


def _tower(hidden: int) -> dict[str, Any]:
    """Tower and projector, under the names of the layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_tower.patch_embed.proj.bias": (WIDTH,),
        "vision_tower.patch_embed.pos_emb.weight": (GRID, GRID, WIDTH),
        **norm("vision_tower.encoder.final_layernorm", WIDTH),
        **norm("multi_modal_projector.pre_norm", WIDTH),
        **linear("multi_modal_projector.linear_1", 4 * WIDTH, 4 * WIDTH),
        **linear("multi_modal_projector.linear_2", hidden, 4 * WIDTH),
    }
    for layer in range(TOWER["num_hidden_layers"]):
        name = f"vision_tower.encoder.blocks.{layer}"
        shapes |= norm(f"{name}.norm0", WIDTH) | norm(f"{name}.norm1", WIDTH)
        shapes |= linear(f"{name}.wqkv", 3 * WIDTH, WIDTH) | linear(f"{name}.wo", WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.fc0", 2 * WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.fc1", WIDTH, 2 * WIDTH)
    return drawn(shapes, 3)


def _write(made: Any, pad: int, model: Any, where: Path) -> None:
    text = deepseek.published(model)
    weights = {f"language_model.{name}": value for name, value in text.items()}
    weights |= _tower(model.config.hidden_size)
    save_file(
        {name: value.detach().contiguous().clone() for name, value in weights.items()},
        where / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = dict(
        architectures=["KimiVLForConditionalGeneration"],
        model_type="kimi_vl",
        vision_config=TOWER,
        text_config=deepseek.settings_of(model),
        media_placeholder_token_id=pad,
        torch_dtype="float32",
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "processing_kimi_vl.py").write_text(PROCESSING)
    made.save_pretrained(where)
    image = dict(
        image_processor_type="KimiVLImageProcessor",
        processor_class="KimiVLProcessor",
        auto_map={
            "AutoProcessor": "processing_kimi_vl.KimiVLProcessor",
            "AutoImageProcessor": "processing_kimi_vl.KimiVLImageProcessor",
        },
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def kimi_vl() -> Checkpoint:
    made, vocab = tokenizer(MARKS)
    # The prompt goes through the tokenizer and back, so words must stay apart.
    made.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return Checkpoint(
        model=hf.DeepseekV3ForCausalLM(deepseek.v3(vocab)),
        processor=None,
        vocab=vocab,
        image=PLACE,
        image_ids=(vocab[PAD],),
        sizes=((56, 112), (84, 84)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True, **deepseek.ON_CPU},
        write=partial(_write, made, vocab[PAD]),
        latent=True,
    )
