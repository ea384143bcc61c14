"""InternVL in transformers' layout."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings


def _internvl(kind: str, **text: Any) -> Checkpoint:
    named = dict(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    made, vocab = tokenizer(tuple(named.values()), named)
    config = hf.InternVLConfig(
        vision_config=dict(
            model_type="internvl_vision",
            image_size=[64, 64],
            patch_size=[8, 8],
            use_qk_norm=False,
            layer_scale_init_value=1.0,
            **tower_settings(),
        ),
        text_config=getattr(hf, f"{kind}Config")(
            architectures=[f"{kind}ForCausalLM"], **text_settings(vocab, **text)
        ),
        image_token_id=vocab["<IMG_CONTEXT>"],
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 64, "width": 64}
    return Checkpoint(
        model=hf.InternVLForConditionalGeneration(config),
        processor=hf.InternVLProcessor(
            image_processor=hf.GotOcr2ImageProcessor(
                size=size, crop_to_patches=True, min_patches=1, max_patches=4
            ),
            tokenizer=made,
            video_processor=hf.InternVLVideoProcessor(size=size),
            image_seq_length=16,
        ),
        vocab=vocab,
        image="<IMG_CONTEXT>",
        image_ids=(vocab["<IMG_CONTEXT>"],),
        sizes=((64, 128), (64, 64)),
        decoder=lambda model: model.model.language_model,
    )


def internvl() -> Checkpoint:
    """InternVL 3."""
    return _internvl("Qwen2")


def internvl_qwen3() -> Checkpoint:
    """InternVL 3.5."""
    return _internvl("Qwen3", head_dim=32)
