"""GLM-4.1V, GLM-4.5V with its mixture of experts, and GLM-OCR."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer

MARKS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")

BIAS = {"attention_bias": True}
"""Without it vLLM's weights would miss it, silently; GLM-OCR has none."""


def _glm(kind: str, **text: Any) -> Checkpoint:
    named = dict(image_token="<|image|>", video_token="<|video|>")
    made, vocab = tokenizer((*MARKS, *named.values()), named)
    rope = dict(
        rope_type="default",
        rope_theta=10000.0,
        mrope_section=[2, 3, 3],
        partial_rotary_factor=0.5,
    )
    config = getattr(hf, f"{kind}Config")(
        text_config=text_settings(vocab, rope_parameters=rope, **text),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            out_hidden_size=128,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            image_size=112,
            in_channels=3,
        ),
        image_token_id=vocab["<|image|>"],
        video_token_id=vocab["<|video|>"],
        image_start_token_id=vocab["<|begin_of_image|>"],
        image_end_token_id=vocab["<|end_of_image|>"],
        video_start_token_id=vocab["<|begin_of_video|>"],
        video_end_token_id=vocab["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    return Checkpoint(
        model=getattr(hf, f"{kind}ForConditionalGeneration")(config),
        processor=hf.Glm4vProcessor(
            image_processor=hf.Glm4vImageProcessor(patch_size=14, size=size),
            tokenizer=made,
            video_processor=hf.Glm4vVideoProcessor(patch_size=14),
        ),
        vocab=vocab,
        image="<|begin_of_image|><|image|><|end_of_image|>",
        image_ids=(vocab["<|image|>"],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model.language_model,
    )


def glm4_1v() -> Checkpoint:
    return _glm("Glm4v", **BIAS)


def glm4_5v() -> Checkpoint:
    """The first layer dense, the others with four experts and a shared one."""
    return _glm(
        "Glm4vMoe",
        **BIAS,
        head_dim=32,
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        use_qk_norm=False,  # vLLM asks, transformers has none
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )


def glm_ocr() -> Checkpoint:
    # Three times the width: what transformers says of the tower's merger, vLLM says of the language model's MLP.
    return _glm("GlmOcr", head_dim=32, intermediate_size=384)
