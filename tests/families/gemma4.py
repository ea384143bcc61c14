"""Gemma 4 as its larger models are: no embeddings per layer, no shared keys; layers' keys differ in size.

A picture's tokens see one another in both directions in layers with a sliding window, and there alone.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.models.gemma4 import image_processing_gemma4
from transformers.models.gemma4_unified import (
    image_processing_gemma4_unified,
    modeling_gemma4_unified,
)

from tests.families.gemma import SEEN
from tests.families.making import Checkpoint, text_settings, tokenizer

PATCH, POOLED, TOKENS = 4, 3, 16
"""Pixels of a patch's side, patches of a token's, and the most tokens of a picture."""
UNIT = PATCH * POOLED
NAMED = dict(
    image_token="<|image|>",
    boi_token="<|image>",
    eoi_token="<image|>",
    audio_token="<|audio|>",
    boa_token="<|audio>",
    eoa_token="<audio|>",
)
VIDEO = "<|video|>"


TOWER = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    position_embedding_size=64,
    default_output_length=TOKENS,
)


def _write(processor: Any, model: Any, where: Path) -> None:
    # The language model multiplies them by the root of its width.
    model.get_input_embeddings().weight.data.mul_(0.1)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.save_pretrained(where)
    processor.save_pretrained(where)


def gemma4(**text: Any) -> Checkpoint:
    return _gemma4("Gemma4", TOWER, hidden_size_per_layer_input=0, **text)


def _gemma4(kind: str, vision: dict[str, Any], **text: Any) -> Checkpoint:
    for module in (image_processing_gemma4, image_processing_gemma4_unified):
        module._SUPPORTED_SOFT_TOKENS = (TOKENS,)  # 70 and more
    made, vocab = tokenizer((*NAMED.values(), VIDEO), NAMED)
    config = getattr(hf, f"{kind}Config")(
        text_config=text_settings(
            vocab,
            tie_word_embeddings=True,
            num_key_value_heads=4,
            head_dim=32,
            global_head_dim=64,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            use_bidirectional_attention="vision",
            final_logit_softcapping=30.0,
            sliding_window=SEEN,
            layer_types=["sliding_attention", "full_attention"] * 2,
            **text,
        ),
        vision_config=dict(patch_size=PATCH, pooling_kernel_size=POOLED, **vision),
        audio_config=None,
        tie_word_embeddings=True,
        image_token_id=vocab[NAMED["image_token"]],
        boi_token_id=vocab[NAMED["boi_token"]],
        eoi_token_id=vocab[NAMED["eoi_token"]],
        audio_token_id=vocab[NAMED["audio_token"]],
        boa_token_id=vocab[NAMED["boa_token"]],
        eoa_token_index=vocab[NAMED["eoa_token"]],
        video_token_id=vocab[VIDEO],
    )
    sizes = dict(patch_size=PATCH, pooling_kernel_size=POOLED, max_soft_tokens=TOKENS)
    processor = getattr(hf, f"{kind}Processor")(
        feature_extractor=getattr(hf, f"{kind}AudioFeatureExtractor")(),
        image_processor=getattr(hf, f"{kind}ImageProcessor")(**sizes),
        tokenizer=made,
        video_processor=getattr(hf, f"{kind}VideoProcessor")(),
        image_seq_length=TOKENS,
    )
    return Checkpoint(
        model=getattr(hf, f"{kind}ForConditionalGeneration")(config),
        processor=processor,
        vocab=vocab,
        image=NAMED["image_token"],
        image_ids=(vocab[NAMED["image_token"]],),
        sizes=((4 * UNIT, 4 * UNIT), (3 * UNIT, 5 * UNIT)),
        decoder=lambda model: model.model.language_model,
        options={
            "disable_chunked_mm_input": True,
            "limit_mm_per_prompt": {"image": 2, "video": 0},  # of which one may have 2496 tokens
        },
        group_layers=1,
        nested=True,
        unused=("num_soft_tokens_per_image",),
        shrunk={"gemma4_mm._SUPPORTED_SOFT_TOKENS": lambda _: (TOKENS,)},
        write=partial(_write, processor),
        attention="TRITON_ATTN",
        windows={0: SEEN, 2: SEEN},
    )


def gemma4_moe() -> Checkpoint:
    """26B-A4B: four experts beside each layer's MLP."""
    return gemma4(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64)


def gemma4_unified() -> Checkpoint:
    """12B: a picture's patches go into the decoder by a projection, without a tower."""
    # transformers' forward lets them see one another in every layer; its generation, as vLLM, under a window alone.
    masks = modeling_gemma4_unified.create_masks_for_vision_model
    modeling_gemma4_unified.create_masks_for_generate = masks
    vision = dict(mm_embed_dim=128, mm_posemb_size=64, output_proj_dims=128, num_soft_tokens=TOKENS)
    return _gemma4("Gemma4Unified", vision)
