"""LLaVA's line, and Mistral's vision models: Mistral 3, LightOnOCR, and Pixtral in transformers' layout.

What LLaVA-1.5 and -NeXT do in every other respect is asked of ``tests/engine/tiny_llava.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings


def _inner(model: Any) -> Any:
    return model.model.language_model


def _siglip_name(name: str) -> str:
    """transformers 5 dropped a level of the tower's names; vLLM reads the hub's."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def llava_onevision() -> Checkpoint:
    made, vocab = tokenizer(
        ("<image>", "<video>"), dict(image_token="<image>", video_token="<video>")
    )
    pinpoints = [[64, 64], [64, 128], [128, 64], [128, 128]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **tower_settings(image_size=64, patch_size=16, vision_use_head=False)
        ),
        text_config=hf.Qwen2Config(architectures=["Qwen2ForCausalLM"], **text_settings(vocab)),
        image_token_index=vocab["<image>"],
        video_token_index=vocab["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    size = {"height": 64, "width": 64}
    return Checkpoint(
        model=hf.LlavaOnevisionForConditionalGeneration(config),
        processor=hf.LlavaOnevisionProcessor(
            image_processor=hf.LlavaOnevisionImageProcessor(
                size=size, image_grid_pinpoints=pinpoints
            ),
            tokenizer=made,
            video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
        ),
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=((64, 64), (64, 128)),
        decoder=_inner,
        rename=_siglip_name,
    )


def _mistral(kind: str, settings: dict[str, Any], merge: dict[str, int]) -> Checkpoint:
    named = dict(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    made, vocab = tokenizer(tuple(named.values()), named)
    config = getattr(hf, f"{kind}Config")(
        text_config=hf.MistralConfig(
            architectures=["MistralForCausalLM"],
            **text_settings(vocab, head_dim=32, sliding_window=None),
        ),
        vision_config=hf.PixtralVisionConfig(
            **tower_settings(image_size=168, patch_size=14, head_dim=32)
        ),
        image_token_index=vocab["[IMG]"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **settings,
    )
    return Checkpoint(
        model=getattr(hf, f"{kind}ForConditionalGeneration")(config),
        processor=hf.PixtralProcessor(
            image_processor=hf.PixtralImageProcessor(
                patch_size={"height": 14, "width": 14}, size={"longest_edge": 168}
            ),
            tokenizer=made,
            patch_size=14,
            **merge,
            **named,
        ),
        vocab=vocab,
        image="[IMG]",
        image_ids=(vocab["[IMG]"],),
        sizes=((112, 168), (84, 112)),
        decoder=_inner,
    )


def mistral3() -> Checkpoint:
    settings = dict(spatial_merge_size=2, multimodal_projector_bias=False)
    return _mistral("Mistral3", settings, dict(spatial_merge_size=2))


def _write_lighton(saved: Any, config: Any, model: Any, where: Path) -> None:
    """As published: Mistral 3's configuration and processor around weights under other names."""
    model.config.dtype = config.dtype = torch.float32
    model.save_pretrained(where)
    config.architectures = ["LightOnOCRForConditionalGeneration"]
    config.save_pretrained(where)
    saved.save_pretrained(where)


def lighton_ocr() -> Checkpoint:
    """Qwen3 behind Pixtral's tower; rows of a picture have no breaks between them."""
    named = dict(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    made, vocab = tokenizer(tuple(named.values()), named)
    settings: dict[str, Any] = dict(
        text_config=hf.Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            # vLLM's projector has this epsilon, transformers' that of the language model.
            **text_settings(vocab, head_dim=32, rms_norm_eps=1e-5),
        ),
        vision_config=hf.PixtralVisionConfig(
            **tower_settings(image_size=168, patch_size=14, head_dim=32)
        ),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    published = hf.Mistral3Config(
        **settings,
        image_token_index=vocab["[IMG]"],
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
    )
    images = hf.PixtralImageProcessor(
        patch_size={"height": 28, "width": 28}, size={"longest_edge": 168}
    )
    saved = hf.PixtralProcessor(
        image_processor=images, tokenizer=made, patch_size=14, spatial_merge_size=2, **named
    )
    model = hf.LightOnOcrForConditionalGeneration(
        hf.LightOnOcrConfig(**settings, image_token_id=vocab["[IMG]"])
    )
    return Checkpoint(
        model=model,
        processor=hf.LightOnOcrProcessor(image_processor=images, tokenizer=made),
        vocab=vocab,
        image="[IMG]",
        image_ids=(vocab["[IMG]"],),
        sizes=((112, 168), (84, 112)),
        decoder=_inner,
        write=partial(_write_lighton, saved, published),
    )


def pixtral() -> Checkpoint:
    """The layout of mistral-community/pixtral-12b: LLaVA's classes with Pixtral's tower."""
    settings = dict(vision_feature_select_strategy="full", image_seq_length=1)
    return _mistral("Llava", settings, {})


def _clip(kind: str, text: str, config: dict[str, Any], image: dict[str, Any]) -> Checkpoint:
    """LLaVA-1.5 and -NeXT: a CLIP tower, its second-last layer, without the class token."""
    made, vocab = tokenizer(("<image>",), dict(image_token="<image>"))
    settings = getattr(hf, f"{kind}Config")(
        vision_config=hf.CLIPVisionConfig(
            **tower_settings(num_hidden_layers=3, projection_dim=64, image_size=56, patch_size=8)
        ),
        text_config=getattr(hf, f"{text}Config")(
            architectures=[f"{text}ForCausalLM"],
            **text_settings(vocab, **({"sliding_window": None} if text == "Mistral" else {})),
        ),
        image_token_index=vocab["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=49,
        tie_word_embeddings=False,
        **config,
    )
    made_image = getattr(hf, "LlavaNextImageProcessor" if config else "CLIPImageProcessor")(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **image
    )
    return Checkpoint(
        model=getattr(hf, f"{kind}ForConditionalGeneration")(settings),
        processor=getattr(hf, f"{kind}Processor")(
            image_processor=made_image,
            tokenizer=made,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=((56, 104), (112, 56)) if config else ((56, 56), (56, 56)),
        decoder=_inner,
        rename=_siglip_name,
    )


def llava() -> Checkpoint:
    return _clip("Llava", "Llama", {}, {})


def llava_next() -> Checkpoint:
    pinpoints = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
    return _clip("LlavaNext", "Mistral", pinpoints, pinpoints)
