"""Families that vLLM has no class for, and serves by its Transformers backend: HunyuanOCR, Aya Vision, ...

Pictures go through transformers' towers there, under either engine.
"""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.families import qwen
from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

HUNYUAN = ("<|im_begin|>", "<|im_pad|>", "<|im_end|>")


def hunyuan_vl() -> Checkpoint:
    """M-RoPE of four axes: place in the prompt, column, row, number of the picture."""
    begin, image, end = HUNYUAN
    named = dict(image_token=image, image_start_token=begin, image_end_token=end)
    made, vocab = tokenizer(HUNYUAN, named)
    text = text_settings(
        vocab,
        head_dim=32,
        rope_parameters=dict(
            rope_type="dynamic", alpha=4.0, factor=1.0, rope_theta=5000.0, mrope_section=[4] * 4
        ),
    )
    config = hf.HunYuanVLConfig(
        text_config=text,
        vision_config=tower_settings(
            patch_size=16, max_image_size=256, min_image_size=32, out_hidden_size=128
        ),
        image_token_id=vocab[image],
        im_start_id=vocab[begin],
        im_end_id=vocab[end],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    return Checkpoint(
        model=hf.HunYuanVLForConditionalGeneration(config),
        processor=hf.HunYuanVLProcessor(
            image_processor=hf.HunYuanVLImageProcessor(size=size), tokenizer=made
        ),
        vocab=vocab,
        image=f"{begin}{image}{end}",
        image_ids=(vocab[image],),
        sizes=((128, 192), (128, 192)),
        single=True,  # vLLM 0.32 mixes up the tokens of two pictures that it encodes at once
        decoder=_inner,
        views=True,
    )


def hyperclovax_vision() -> Checkpoint:
    """Qwen2.5-VL's tower in front of HyperCLOVA X; positions are those of text."""
    names = ("<|image_pad|>", "<|video_pad|>")
    made, vocab = tokenizer(names, dict(image_token=names[0], video_token=names[1]))
    config = hf.HyperCLOVAXVisionV2Config(
        text_config=hf.HyperCLOVAXConfig(
            **text_settings(vocab, residual_multiplier=0.5, embedding_multiplier=2.0)
        ),
        vision_config=dict(qwen.TOWER_2_5, patch_size=14, spatial_merge_size=2, in_channels=3),
        image_token_id=vocab[names[0]],
        video_token_id=vocab[names[1]],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    return Checkpoint(
        model=hf.HyperCLOVAXVisionV2ForConditionalGeneration(config),
        processor=hf.HyperCLOVAXVisionV2Processor(
            image_processor=hf.Qwen2VLImageProcessor(patch_size=14, size=size),
            tokenizer=made,
            video_processor=hf.Qwen2VLVideoProcessor(patch_size=14, size=size),
        ),
        vocab=vocab,
        image=names[0],
        image_ids=(vocab[names[0]],),
        sizes=((140, 224), (168, 112)),
        decoder=_inner,
        # transformers reads a vocabulary that is saved with such a model as another one: words would be lost.
        write_ids=lambda text, _: made.encode(text),
    )


TILES = tuple(f"TILE_{number}" for number in range(1, 5))
AYA = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL")
SEEN = 24
"""How many tokens a layer with a window sees, the row's own included: fewer than a picture has."""


def aya_vision() -> Checkpoint:
    """Tiles in front of Cohere 2, three layers in four of which have a window."""
    made, vocab = tokenizer(("<image>", *AYA, *TILES), dict(image_token="<image>"))
    text = text_settings(vocab, tie_word_embeddings=True, sliding_window=SEEN, logit_scale=1.0)
    side = 64
    config = hf.AyaVisionConfig(
        text_config=hf.Cohere2Config(
            **text, layer_types=["full_attention", "sliding_attention"] * 2
        ),
        vision_config=hf.SiglipVisionConfig(
            **tower_settings(image_size=side, patch_size=8, vision_use_head=False)
        ),
        downsample_factor=2,
        image_token_index=vocab["<|IMG_PATCH|>"],
        tie_word_embeddings=True,
    )
    images = hf.GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=True, max_patches=4
    )
    return Checkpoint(
        model=hf.AyaVisionForConditionalGeneration(config),
        processor=hf.AyaVisionProcessor(
            image_processor=images, tokenizer=made, patch_size=8, img_size=side, downsample_factor=2
        ),
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<|IMG_PATCH|>"],),
        sizes=((side, 2 * side), (side, side)),
        decoder=_inner,
        windows={1: SEEN, 3: SEEN},
        embeddings=0.4,
    )


def _inner(model: Any) -> Any:
    return model.model.language_model
