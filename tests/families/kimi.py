"""Kimi-VL and Kimi-K2.5: one token per 28 x 28 pixels, around DeepSeek-V3's language model, which stores latent
attention.

transformers has no class for the layout: tower and projector are drawn here under the checkpoint's names, and the
language model alone is the reference, from the embeddings that vLLM made. Kimi-VL brings its processor and
image processor as code; these are ours, as small as vLLM allows.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import decoders

from tests.families import deepseek
from tests.families.making import (
    Checkpoint,
    drawn,
    linear,
    norm,
    tokenizer,
    write_weights,
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


def _tower(hidden: int, projector: str, first: str, second: str) -> dict[str, Any]:
    """Tower and projector, under the names of the layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_tower.patch_embed.proj.bias": (WIDTH,),
        "vision_tower.patch_embed.pos_emb.weight": (GRID, GRID, WIDTH),
        **norm("vision_tower.encoder.final_layernorm", WIDTH),
        **norm(f"{projector}.pre_norm", WIDTH),
        **linear(f"{projector}.{first}", 4 * WIDTH, 4 * WIDTH),
        **linear(f"{projector}.{second}", hidden, 4 * WIDTH),
    }
    for layer in range(TOWER["num_hidden_layers"]):
        name = f"vision_tower.encoder.blocks.{layer}"
        shapes |= norm(f"{name}.norm0", WIDTH) | norm(f"{name}.norm1", WIDTH)
        shapes |= linear(f"{name}.wqkv", 3 * WIDTH, WIDTH) | linear(f"{name}.wo", WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.fc0", 2 * WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.fc1", WIDTH, 2 * WIDTH)
    return drawn(shapes, 3)


def _write(
    made: Any, config: Any, projector: tuple[str, str, str], model: Any, where: Path
) -> None:
    text = deepseek.published(model)
    weights = {f"language_model.{name}": value for name, value in text.items()}
    weights |= _tower(model.config.hidden_size, *projector)
    write_weights(weights, where / "model.safetensors")
    settings = deepseek.settings_of(model)
    told = dict(config, text_config=settings, torch_dtype="float32")
    (where / "config.json").write_text(json.dumps(told, indent=1))
    made.save_pretrained(where)


def _write_vl(made: Any, config: Any, model: Any, where: Path) -> None:
    _write(made, config, ("multi_modal_projector", "linear_1", "linear_2"), model, where)
    (where / "processing_kimi_vl.py").write_text(PROCESSING)
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
    config = dict(
        architectures=["KimiVLForConditionalGeneration"],
        model_type="kimi_vl",
        vision_config=TOWER,
        media_placeholder_token_id=vocab[PAD],
    )
    return Checkpoint(
        model=hf.DeepseekV3ForCausalLM(deepseek.v3(vocab)),
        processor=None,
        vocab=vocab,
        image=PLACE,
        image_ids=(vocab[PAD],),
        sizes=((56, 112), (84, 84)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True, **deepseek.ON_CPU},
        write=partial(_write_vl, made, config),
        latent=True,
    )


MEDIA = dict(
    patch_size=PATCH,
    merge_kernel_size=2,
    temporal_merge_kernel_size=4,
    in_patch_limit=64,
    in_patch_limit_each_frame=64,
    in_patch_limit_video=256,
    patch_limit_on_one_side=GRID,
    fixed_output_tokens=None,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
)
"""Of the image processor that vLLM has of its own."""


def _write_k2_5(made: Any, config: Any, model: Any, where: Path) -> None:
    _write(made, config, ("mm_projector", "proj.0", "proj.2"), model, where)
    (where / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": MEDIA}, indent=1))


def kimi_k2_5() -> Checkpoint:
    """Pictures are chunks of vision, and queries come from a latent vector, too."""
    made, vocab = tokenizer(("<|media_begin|>", *MARKS[1:]))
    made.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tower = {name: value for name, value in TOWER.items() if not name.startswith("init_")}
    config = dict(
        architectures=["KimiK25ForConditionalGeneration"],
        model_type="kimi_k25",
        vision_config=tower
        | dict(model_type="kimi_k25_vision", pos_emb_height=GRID, pos_emb_width=GRID),
        image_token_id=vocab[PAD],
        use_unified_vision_chunk=True,
        tie_word_embeddings=False,
    )
    return Checkpoint(
        model=hf.DeepseekV3ForCausalLM(deepseek.v3(vocab, q_lora_rank=64)),
        processor=None,
        vocab=vocab,
        image=PLACE.replace("start", "begin"),
        image_ids=(vocab[PAD],),
        sizes=((56, 112), (84, 84)),
        decoder=lambda model: model.model,
        options={"limit_mm_per_prompt": {"vision_chunk": 2}, **deepseek.ON_CPU},
        write=partial(_write_k2_5, made, config),
        latent=True,
        chunks=True,
    )
