"""Isaac: Qwen3 with M-RoPE behind a SigLIP 2 whose patches are shuffled, 2 x 2 a token.

transformers has the parts and no class for the layout: tower and projector are written here under its names, and the
language model alone is the reference, from the embeddings and positions that vLLM made.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf

from tests.families.keye import qwen3_with_mrope
from tests.families.making import (
    Checkpoint,
    drawn,
    fill,
    linear,
    tokenizer,
    tower_settings,
    write_weights,
)

PATCH, PATCHES, WIDTH = 16, 64, 64
HEAD = 32
TOWER = tower_settings(patch_size=PATCH, num_patches=PATCHES, vision_use_head=False)


def _tower(hidden: int) -> dict[str, Any]:
    tower = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**TOWER))
    fill(tower, 3)
    found = {}
    for name, value in tower.state_dict().items():
        part, rest = name.removeprefix("vision_model.").split(".", 1)
        found[f"model.vision_embedding.0.{part}.{rest}"] = value
    shapes = linear("model.vision_embedding.1", 16 * WIDTH, 4 * WIDTH, bias=False)
    shapes |= linear("model.vision_embedding.3", hidden, 16 * WIDTH, bias=False)
    return found | drawn(shapes, 4)


def _write(made: Any, model: Any, where: Path) -> None:
    weights = model.state_dict() | _tower(model.config.hidden_size)
    write_weights(weights, where / "model.safetensors")
    config = model.config.to_dict() | dict(
        architectures=["IsaacForConditionalGeneration"],
        model_type="isaac",
        vision_config=TOWER | dict(pixel_shuffle_scale_factor=2),
        pixel_shuffle_scale=2,
        vision_max_num_patches=512,
        vision_token="<image>",
        torch_dtype="float32",
    )
    config.pop("dtype", None)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    made.save_pretrained(where)


def isaac() -> Checkpoint:
    made, vocab = tokenizer(("<image>", "<|image_pad|>"))
    section = (HEAD // 4, HEAD // 8, HEAD // 8)  # vLLM's, whatever is said
    return Checkpoint(
        model=qwen3_with_mrope(vocab, HEAD, section),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((256, 320), (320, 256)),
        decoder=lambda model: model.model,
        write=partial(_write, made),
    )
