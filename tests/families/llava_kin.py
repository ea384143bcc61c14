"""R-4B, Bee and LLaVA-NeXT-Video: LLaVA's layouts with other projectors, or for videos alone.

R-4B and Bee bring their classes as code, and transformers has none: the projector's norm is added here to the
checkpoint of LLaVA-OneVision's class, whose language model is the reference, from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.families.making import (
    Checkpoint,
    drawn,
    linear,
    norm,
    text_settings,
    tokenizer,
    tower_settings,
)

SIDE, PATCH, WIDTH = 64, 16, 64
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
CONFIGURATION = """
from transformers import LlavaOnevisionConfig


class {name}Config(LlavaOnevisionConfig):
    model_type = "{name}"
"""
"""Such a checkpoint brings its configuration class; this one is ours."""


def _write(processor: Any, name: str, inner: int, model: Any, where: Path) -> None:
    """``inner``: how many times the language model's width the projector is wide."""
    model.config.dtype = torch.float32
    model.save_pretrained(where)
    processor.save_pretrained(where)
    hidden = model.config.text_config.hidden_size
    shapes = (
        norm("pre_norm", WIDTH)
        | linear("linear_1", inner * hidden, WIDTH)
        | linear("linear_2", hidden, inner * hidden)
    )
    own = {f"multi_modal_projector.{key}": shape for key, shape in shapes.items()}
    file = where / "model.safetensors"
    kept = {
        key.replace("vision_tower.", "vision_tower.vision_model.", 1): value
        for key, value in load_file(file).items()
        if "multi_modal_projector." not in key
    }
    save_file(kept | drawn(own, 3), file, metadata={"format": "pt"})
    config = json.loads((where / "config.json").read_text()) | dict(
        architectures=[f"{name}ForConditionalGeneration"],
        model_type=name,
        auto_map={"AutoConfig": f"configuration_{name.lower()}.{name}Config"},
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    code = CONFIGURATION.format(name=name)
    (where / f"configuration_{name.lower()}.py").write_text(code)


def _on_qwen3(name: str, inner: int) -> Checkpoint:
    named = dict(image_token="<image>", video_token="<video>")
    made, vocab = tokenizer(tuple(named.values()), named)
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **tower_settings(image_size=SIDE, patch_size=PATCH, vision_use_head=False)
        ),
        text_config=hf.Qwen3Config(
            architectures=["Qwen3ForCausalLM"], **text_settings(vocab, head_dim=32)
        ),
        image_token_index=vocab["<image>"],
        video_token_index=vocab["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=made,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    return Checkpoint(
        model=hf.LlavaOnevisionForConditionalGeneration(config),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=((SIDE, SIDE + 2 * PATCH), (SIDE, 2 * SIDE)),  # no tile is the picture whole
        decoder=lambda model: model.model.language_model,
        options={"trust_remote_code": True},
        write=partial(_write, processor, name, inner),
    )


def r_4b() -> Checkpoint:
    return _on_qwen3("R", 1)


def bee() -> Checkpoint:
    return _on_qwen3("Bee", 4)


def llava_next_video() -> Checkpoint:
    """Videos alone, which vLLM takes one at a time."""
    named = dict(image_token="<image>", video_token="<video>")
    made, vocab = tokenizer(tuple(named.values()), named)
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(
            **tower_settings(num_hidden_layers=3, projection_dim=64, image_size=96, patch_size=8)
        ),
        text_config=hf.LlamaConfig(architectures=["LlamaForCausalLM"], **text_settings(vocab)),
        image_token_index=vocab["<image>"],
        video_token_index=vocab["<video>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        image_grid_pinpoints=[[96, 192], [192, 96]],
        tie_word_embeddings=False,
    )
    size = dict(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    return Checkpoint(
        model=hf.LlavaNextVideoForConditionalGeneration(config),
        processor=None,
        saved=hf.LlavaNextVideoProcessor(
            video_processor=hf.LlavaNextVideoVideoProcessor(**size),
            image_processor=hf.LlavaNextImageProcessor(**size),
            tokenizer=made,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        vocab=vocab,
        image="",
        video="<video>",
        seen_together=1,
        image_ids=(vocab["<video>"],),
        sizes=((96, 96), (96, 96)),
        decoder=lambda model: model.model.language_model,
        rename=lambda name: name.replace("vision_tower.", "vision_tower.vision_model.", 1),
        options={"limit_mm_per_prompt": {"video": 1}},
    )
