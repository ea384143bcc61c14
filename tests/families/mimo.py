"""MiMo-V2-Omni: most layers see a sliding window, with a sink of attention per head and more key heads.

transformers has the language model, which is the reference, from the embeddings that vLLM made. The checkpoint brings
its configuration class as code; this one is ours.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.families.making import (
    Checkpoint,
    drawn,
    linear,
    matrix_per_expert,
    text_settings,
    tokenizer,
    write_weights,
)

SEEN = 24
"""Tokens that a layer with a window sees, the row's own included: fewer than a picture has."""
SLIDING = (1, 2)
HEADS, HEAD, NARROW = 4, 32, 16
TURNED, SCALE, THETA, THETA_IN_WINDOWS = 0.5, 0.707, 5000.0, 10000.0
EXPERTS, CHOSEN, INNER = 4, 2, 64
WIDTH, FEED, PATCH, BLOCKS, TOWER_HEADS = 64, 128, 16, 2, 2
LOUD = 2.0
"""Added to what a sink weighs, so that it takes much of what its head has to give."""
MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_token_id": "<|audio_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "audio_start_token_id": "<|mimo_audio_start|>",
    "audio_end_token_id": "<|mimo_audio_end|>",
    "video_start_token_id": "<|mimo_video_start|>",
    "video_end_token_id": "<|mimo_video_end|>",
}
CONFIGURATION = """
from transformers import PretrainedConfig


class MiMoConfig(PretrainedConfig):
    model_type = "mimo_v2"
"""


def _tower(hidden: int) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (WIDTH, 3, 2, PATCH, PATCH),
        "visual.merger.ln_q.weight": (WIDTH,),
        **linear("visual.merger.mlp.0", 4 * WIDTH, 4 * WIDTH, bias=False),
        **linear("visual.merger.mlp.2", hidden, 4 * WIDTH, bias=False),
    }
    for block in range(BLOCKS):
        front = f"visual.blocks.{block}."
        shapes |= {f"{front}norm1.weight": (WIDTH,), f"{front}norm2.weight": (WIDTH,)}
        shapes |= linear(f"{front}attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{front}attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{front}mlp.gate_proj", FEED, WIDTH)
        shapes |= linear(f"{front}mlp.up_proj", FEED, WIDTH)
        shapes |= linear(f"{front}mlp.down_proj", WIDTH, FEED)
    return drawn(shapes, 3)


def _language(model: Any) -> dict[str, torch.Tensor]:
    """Of the language model, under the hub's names: three matrices per expert."""
    return {
        name.replace("self_attn.sinks", "self_attn.attention_sink_bias"): value
        for name, value in matrix_per_expert(model).items()
    }


def _configuration(model: Any, vocab: dict[str, int]) -> dict[str, Any]:
    """Flat, as the hub has it."""
    config, layers = model.config, range(model.config.num_hidden_layers)
    return dict(
        architectures=["MiMoV2OmniForCausalLM"],
        model_type="mimo_v2",
        auto_map={"AutoConfig": "configuration_mimo.MiMoConfig"},
        torch_dtype="float32",
        **text_settings(vocab, num_key_value_heads=config.num_key_value_heads),
        hidden_act="silu",
        attention_bias=False,
        head_dim=HEAD,
        v_head_dim=config.v_head_dim,
        swa_num_attention_heads=HEADS,
        swa_num_key_value_heads=2 * config.num_key_value_heads,
        swa_head_dim=HEAD,
        swa_v_head_dim=config.v_head_dim,
        sliding_window=SEEN,
        sliding_window_size=SEEN,
        hybrid_layer_pattern=[int(layer in SLIDING) for layer in layers],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        attention_value_scale=SCALE,
        partial_rotary_factor=TURNED,
        rope_theta=THETA,
        swa_rope_theta=THETA_IN_WINDOWS,
        layernorm_epsilon=config.rms_norm_eps,
        moe_layer_freq=[int(kind == "sparse") for kind in config.mlp_layer_types],
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=INNER,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        processor_config={name: vocab[mark] for name, mark in MARKS.items()},
        vision_config=dict(
            depth=BLOCKS,
            hidden_size=WIDTH,
            intermediate_size=FEED,
            num_heads=TOWER_HEADS,
            num_key_value_heads=TOWER_HEADS,
            qk_channels=WIDTH // TOWER_HEADS,
            kv_channels=WIDTH // TOWER_HEADS,
            patch_size=PATCH,
            out_hidden_size=config.hidden_size,
            fullatt_block_indexes=list(range(BLOCKS)),  # windows go through Triton
            use_sink=True,
        ),
    )


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    for layer in SLIDING:
        model.model.layers[layer].self_attn.sinks.data.add_(LOUD)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.tensor([0.2, -0.1, 0.1, 0.0]))
    weights = _language(model) | _tower(model.config.hidden_size)
    write_weights(weights, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(_configuration(model, vocab), indent=1))
    (where / "configuration_mimo.py").write_text(CONFIGURATION)
    made.save_pretrained(where)


def mimo_v2_omni(value_head: int = HEAD, attention: str = "") -> Checkpoint:
    """
    Args:
        value_head: numbers of a head's value; another backend is needed where it is not those of a key.
    """
    made, vocab = tokenizer(tuple(MARKS.values()))
    kinds = ["sliding_attention" if layer in SLIDING else "full_attention" for layer in range(4)]
    rope = {"rope_type": "default", "partial_rotary_factor": TURNED}
    config = hf.MiMoV2FlashConfig(
        **text_settings(vocab, num_key_value_heads=1),
        head_dim=HEAD,
        v_head_dim=value_head,
        sliding_window=SEEN,
        layer_types=kinds,
        attention_value_scale=SCALE,
        rms_norm_eps=0.01,
        rope_parameters={
            "full_attention": rope | {"rope_theta": THETA},
            "sliding_attention": rope | {"rope_theta": THETA_IN_WINDOWS},
        },
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=INNER,
    )
    return Checkpoint(
        model=hf.MiMoV2FlashForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((160, 256), (192, 128)),
        decoder=lambda model: model.model,
        options={
            "trust_remote_code": True,
            "limit_mm_per_prompt": {"image": 2, "video": 0, "audio": 0},
        },
        write=partial(_write, made, vocab),
        windows=dict.fromkeys(SLIDING, SEEN),
        group_layers=1,
        attention=attention,
    )


def mimo_v2_omni_narrow() -> Checkpoint:
    """Values narrower than keys, as published."""
    return mimo_v2_omni(NARROW, "TRITON_ATTN_DIFFKV")
