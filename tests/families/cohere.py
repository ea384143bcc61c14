"""Command-A-Vision: three layers in four see a sliding window, the fourth everything, without positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

SIDE, SEEN, SCALE = 64, 17, 0.25
"""How many tokens a layer with a window sees, the row's own included: fewer than a picture has."""
NAMED = dict(
    image_token="<|IMG_PATCH|>",
    boi_token="<|START_OF_IMG|>",
    eoi_token="<|END_OF_IMG|>",
    img_line_break_token="<|IMG_LINE_BREAK|>",
)


def _write(processor: Any, model: Any, where: Path) -> None:
    """vLLM's windows are a token wider than what the configuration says; transformers' are as it says."""
    model.config.architectures = ["Cohere2VisionForConditionalGeneration"]
    model.config.dtype = torch.float32
    model.save_pretrained(where)
    processor.save_pretrained(where)
    config = json.loads((where / "config.json").read_text())
    config["text_config"]["sliding_window"] -= 1
    (where / "config.json").write_text(json.dumps(config, indent=1))
    file = where / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def cohere2_vision() -> Checkpoint:
    made, vocab = tokenizer(tuple(NAMED.values()), NAMED)
    text = text_settings(vocab, tie_word_embeddings=True)
    config = hf.Cohere2VisionConfig(
        text_config=hf.Cohere2Config(
            architectures=["Cohere2ForCausalLM"], **text, sliding_window=SEEN, logit_scale=SCALE
        ),
        vision_config=hf.SiglipVisionConfig(
            **tower_settings(image_size=SIDE, patch_size=8, vision_use_head=False)
        ),
        image_token_id=vocab["<|IMG_PATCH|>"],
        alignment_intermediate_size=256,
    )
    images = hf.Cohere2VisionImageProcessor(
        size={"height": SIDE, "width": SIDE}, patch_size=4, max_patches=2
    )
    processor = hf.Cohere2VisionProcessor(image_processor=images, tokenizer=made)
    types = config.text_config.layer_types
    model = hf.Cohere2VisionForConditionalGeneration(config)
    # transformers leaves the scale out where there is a tower.
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * SCALE)
    return Checkpoint(
        model=model,
        processor=processor,
        vocab=vocab,
        image="<|IMG_PATCH|>",
        image_ids=(vocab["<|IMG_PATCH|>"],),
        sizes=((SIDE, SIDE), (SIDE, 2 * SIDE)),
        decoder=lambda model: model.model.language_model,
        unused=("num_patches",),
        write=lambda model, where: _write(processor, model, where),
        windows={layer: SEEN for layer, kind in enumerate(types) if kind == "sliding_attention"},
    )
