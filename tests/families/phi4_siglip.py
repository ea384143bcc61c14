"""Phi-4-reasoning-vision: Phi-3's decoder behind a SigLIP 2 that takes pictures of their own shape, a token per patch.

transformers has the parts and no class for the layout: tower and projector are written here under its names, and the
language model alone is the reference, from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf

from tests.families.making import (
    Checkpoint,
    drawn,
    fill,
    linear,
    text_settings,
    tokenizer,
    tower_settings,
    write_weights,
)

PATCH, PATCHES, WIDTH = 16, 64, 64
IMAGE = "<|dummy_0|>"
CONFIGURATION = """
from transformers import Phi3Config


class Phi4VisionConfig(Phi3Config):
    model_type = "phi4-siglip"
"""
PROCESSING = '''
from transformers import BatchFeature, ProcessorMixin


class Phi4VisionProcessor(ProcessorMixin):
    """Such a checkpoint brings its processor as code; this one is ours."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text=None, images=None, return_tensors=None, **_):
        found = dict(self.tokenizer(text, return_tensors="pt"))
        if images:
            found |= self.image_processor(images, return_tensors="pt")
        return BatchFeature(found)
'''


def _tower() -> hf.Siglip2VisionModel:
    settings = tower_settings(num_hidden_layers=3, patch_size=PATCH, num_patches=PATCHES)
    tower = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**settings, vision_use_head=False))
    fill(tower, 3)
    return tower


def _write(made: Any, model: Any, where: Path) -> None:
    tower = _tower()
    within = "model.vision_tower.vision_tower.vision_model."
    weights = model.state_dict() | {
        within + name.removeprefix("vision_model."): value
        for name, value in tower.state_dict().items()
    }
    hidden = model.config.hidden_size
    shapes = linear("model.mm_projector.0", hidden, WIDTH)
    weights |= drawn(shapes | linear("model.mm_projector.2", hidden, hidden), 4)
    write_weights(weights, where / "model.safetensors")
    config = model.config.to_dict() | dict(
        architectures=["Phi4ForCausalLMV"],
        model_type="phi4-siglip",
        auto_map={"AutoConfig": "configuration_phi4_vision.Phi4VisionConfig"},
        vision_config=tower.config.to_dict(),
        mm_hidden_size=WIDTH,
        min_num_patches=1,
        max_num_patches=PATCHES,
        torch_dtype="float32",
    )
    config.pop("dtype", None)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_phi4_vision.py").write_text(CONFIGURATION)
    (where / "processing_phi4_vision.py").write_text(PROCESSING)
    hf.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=PATCHES).save_pretrained(where)
    made.save_pretrained(where)
    own = {"AutoProcessor": "processing_phi4_vision.Phi4VisionProcessor"}
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        file = where / name
        told = json.loads(file.read_text())
        told |= {"processor_class": "Phi4VisionProcessor", "auto_map": own}
        file.write_text(json.dumps(told, indent=1))


def phi4_reasoning_vision() -> Checkpoint:
    made, vocab = tokenizer(("<image>", IMAGE))
    config = hf.Phi3Config(**text_settings(vocab))
    return Checkpoint(
        model=hf.Phi3ForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab[IMAGE],),
        sizes=((96, 192), (128, 112)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made),
        shrunk={"phi4siglip._IMAGE_TOKEN_ID": lambda _: vocab[IMAGE]},
    )
