"""LFM2-VL: three in seven layers attend; the others convolve three tokens, and keep the last two of a request."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.families import deepseek
from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

TILE, PATCH = 64, 16
CONV, ATTENTION = "conv", "full_attention"
TYPES = [CONV, ATTENTION, CONV, ATTENTION, CONV, CONV, ATTENTION]
TILES = tuple(f"<|img_row_{row}_col_{column}|>" for row in (1, 2, 3) for column in (1, 2, 3))
MARKS = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *TILES)


def lfm2_vl() -> Checkpoint:
    named = dict(
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail="<|img_thumbnail|>",
    )
    made, vocab = tokenizer(("<image>", *MARKS), named)
    text: dict[str, Any] = text_settings(
        vocab,
        num_hidden_layers=len(TYPES),
        layer_types=TYPES,
        tie_word_embeddings=True,  # as vLLM does whatever is said
        norm_eps=0.01,
        block_multiple_of=32,
        block_auto_adjust_ff_dim=False,
        conv_L_cache=3,
        block_dim=128,  # as published; transformers reads hidden_size
        conv_dim=128,
    )
    config = hf.Lfm2VlConfig(
        text_config=hf.Lfm2Config(architectures=["Lfm2ForCausalLM"], **text),
        vision_config=hf.Siglip2VisionConfig(
            **tower_settings(patch_size=PATCH, num_patches=64, vision_use_head=False)
        ),
        image_token_id=vocab["<image>"],
        projector_hidden_size=96,
        downsample_factor=2,
        tie_word_embeddings=True,
    )
    images = hf.Lfm2VlImageProcessor(
        downsample_factor=2,
        min_tiles=2,
        max_tiles=4,
        min_image_tokens=4,
        max_image_tokens=24,
        encoder_patch_size=PATCH,
        tile_size=TILE,
        max_pixels_tolerance=1.0,
        size={"height": TILE, "width": TILE},
    )
    return Checkpoint(
        model=hf.Lfm2VlForConditionalGeneration(config),
        processor=hf.Lfm2VlProcessor(image_processor=images, tokenizer=made),
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=((96, 160), (128, 256)),  # as it is; in tiles, with a thumbnail
        decoder=lambda model: model.model.language_model,
        rename=lambda name: name.replace("vision_tower.", "vision_tower.vision_model.", 1),
        recurrent=True,
        options=deepseek.ON_CPU,
        embeddings=0.4,
    )
