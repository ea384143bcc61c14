"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer

SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
ROPE = dict(rope_type="default", rope_theta=10000.0)


def _qwen(kind: str, text: dict[str, Any], tower: dict[str, Any], patch: int) -> Checkpoint:
    made, vocab = tokenizer(
        SPECIALS, dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    )
    config = getattr(hf, f"{kind}Config")(
        text_config=text_settings(vocab, **text),
        vision_config=dict(
            patch_size=patch, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, **tower
        ),
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    unit = 2 * patch
    size = {"shortest_edge": unit * unit, "longest_edge": unit * unit * 200}
    old = "Qwen2VL" if kind.startswith("Qwen2") else "Qwen3VL"
    processors = kind.removesuffix("Moe").replace("Qwen3_5", "Qwen3VL")
    return Checkpoint(
        model=getattr(hf, f"{kind}ForConditionalGeneration")(config),
        processor=getattr(hf, f"{processors}Processor")(
            image_processor=hf.Qwen2VLImageProcessor(patch_size=patch, size=size),
            tokenizer=made,
            video_processor=getattr(hf, f"{old}VideoProcessor")(patch_size=patch, size=size),
        ),
        vocab=vocab,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((5 * unit, 8 * unit), (6 * unit, 4 * unit)),
        decoder=lambda model: model.model.language_model,
    )


def qwen2_vl() -> Checkpoint:
    return _qwen(
        "Qwen2VL",
        dict(rope_parameters=dict(ROPE, mrope_section=[4, 6, 6])),
        dict(depth=2, embed_dim=64, hidden_size=128, mlp_ratio=2, num_heads=2),
        patch=14,
    )


TOWER_2_5 = dict(
    depth=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=2,
    out_hidden_size=128,
    window_size=112,
    fullatt_block_indexes=[1],
)


def qwen2_5_vl() -> Checkpoint:
    return _qwen(
        "Qwen2_5_VL",
        dict(rope_parameters=dict(ROPE, mrope_section=[4, 6, 6])),
        TOWER_2_5,
        patch=14,
    )


DEEPSTACK_TOWER = dict(
    depth=4,
    hidden_size=64,
    intermediate_size=128,
    num_heads=2,
    out_hidden_size=128,
    num_position_embeddings=64,
    deepstack_visual_indexes=[0, 1, 2],
)
INTERLEAVED = dict(ROPE, mrope_section=[6, 5, 5], mrope_interleaved=True)


def qwen3_vl() -> Checkpoint:
    """Three injections into six layers, so that cliffs lie before, between and after them."""
    text = dict(head_dim=32, num_hidden_layers=6, rope_parameters=INTERLEAVED)
    return _qwen("Qwen3VL", text, DEEPSTACK_TOWER, patch=16)


def qwen3_vl_moe(tower: Mapping[str, Any] | None = None, **changes: Any) -> Checkpoint:
    """``tower`` and ``changes``: what else the tower and the language model are told."""
    text: dict[str, Any] = dict(
        head_dim=32,
        rope_parameters=INTERLEAVED,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,  # transformers does so whatever is said, vLLM asks
    )
    made = _qwen("Qwen3VLMoe", text | changes, DEEPSTACK_TOWER | dict(tower or {}), patch=16)
    return replace(made, experts_transposed=True)


def qwen3_5(**changes: Any) -> Checkpoint:
    """Two of eight layers attend; the others keep a state per request."""
    return _qwen3_5("Qwen3_5", **changes)


def qwen3_5_moe(**changes: Any) -> Checkpoint:
    experts = dict(
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return _qwen3_5("Qwen3_5Moe", **(experts | changes))


def linear_text(**changes: Any) -> dict[str, Any]:
    """Of a language model of which two layers in eight attend."""
    text = dict(
        num_hidden_layers=8,
        head_dim=32,
        rope_parameters=dict(ROPE, mrope_section=[2, 1, 1], mrope_interleaved=True),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    )
    return text | changes


def _qwen3_5(kind: str, **changes: Any) -> Checkpoint:
    tower = {k: v for k, v in DEEPSTACK_TOWER.items() if k != "deepstack_visual_indexes"}
    made = _qwen(kind, linear_text(**changes), dict(tower, depth=2), patch=16)
    encode = made.processor.tokenizer.encode
    # transformers reads a vocabulary that is saved with such a model as Qwen's own: words would be lost.
    return replace(made, recurrent=True, unit_offset=True, write_ids=lambda text, _: encode(text))
