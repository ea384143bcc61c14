"""GLM-4V: ChatGLM's language model, and a tower whose start and end of a picture are embeddings too.

transformers has GLM-4's language model in a layout of its own, and no class for the whole: the tower is
drawn here under the checkpoint's names, and the language model is the reference, from the embeddings that
vLLM made.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, write_weights

WIDTH, PATCH, SIDE, LAYERS, FEED = 64, 14, 168, 2, 256
MARKS = ("<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>")


def _tower(hidden: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def near(mean: float, *shape: int) -> torch.Tensor:
        return mean + 0.3 * torch.randn(shape, generator=generator)

    def matrix(rows: int, *columns: int) -> torch.Tensor:
        fan_in = torch.Size(columns).numel()
        return torch.randn(rows, *columns, generator=generator) / fan_in**0.5

    patches = (SIDE // PATCH) ** 2
    weights = {
        "patch_embedding.proj.weight": matrix(WIDTH, 3, PATCH, PATCH),
        "patch_embedding.proj.bias": near(0, WIDTH),
        "patch_embedding.cls_embedding": near(0, 1, WIDTH),
        "patch_embedding.position_embedding.weight": near(0, patches + 1, WIDTH),
        "conv.weight": matrix(hidden, WIDTH, 2, 2),
        "conv.bias": near(0, hidden),
        "linear_proj.linear_proj.weight": matrix(hidden, hidden),
        "linear_proj.norm1.weight": near(1, hidden),
        "linear_proj.norm1.bias": near(0, hidden),
        "linear_proj.gate_proj.weight": matrix(FEED, hidden),
        "linear_proj.dense_h_to_4h.weight": matrix(FEED, hidden),
        "linear_proj.dense_4h_to_h.weight": 2 * matrix(hidden, FEED),
        "boi": near(0, 1, 1, hidden),
        "eoi": near(0, 1, 1, hidden),
    }
    for layer in range(LAYERS):
        name = f"transformer.layers.{layer}."
        for key, rows, columns in (
            ("attention.query_key_value", 3 * WIDTH, WIDTH),
            ("attention.dense", WIDTH, WIDTH),
            ("mlp.fc1", 128, WIDTH),
            ("mlp.fc2", WIDTH, 128),
        ):
            weights[f"{name}{key}.weight"] = matrix(rows, columns)
            weights[f"{name}{key}.bias"] = near(0, rows)
        for key in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}{key}.weight"] = near(1, WIDTH)
            weights[f"{name}{key}.bias"] = near(0, WIDTH)
    return {f"transformer.vision.{name}": value for name, value in weights.items()}


NAMES = {
    "lm_head.": "transformer.output_layer.",
    "model.embed_tokens.": "transformer.embedding.word_embeddings.",
    "model.norm.": "transformer.encoder.final_layernorm.",
    "model.layers.": "transformer.encoder.layers.",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def as_chatglm(model: Any) -> dict[str, torch.Tensor]:
    """GLM-4's weights in ChatGLM's layout: queries, keys and values in one matrix, other names."""
    state = model.state_dict()
    found = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name = name.replace("self_attn.q_proj", "self_attention.query_key_value")
            value = torch.cat(parts)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    text = model.config
    weights = _tower(text.hidden_size) | as_chatglm(model)
    write_weights(weights, where / "model.safetensors")
    config = dict(
        architectures=["GLM4VForCausalLM"],
        model_type="chatglm",
        num_layers=text.num_hidden_layers,
        padded_vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        kv_channels=text.head_dim,
        num_attention_heads=text.num_attention_heads,
        seq_length=text.max_position_embeddings,
        layernorm_epsilon=text.rms_norm_eps,
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=text.num_key_value_heads,
        original_rope=True,
        rope_ratio=1,
        boi_token_id=vocab["<|begin_of_image|>"],
        eoi_token_id=vocab["<|end_of_image|>"],
        pad_token_id=vocab["<|endoftext|>"],
        eos_token_id=2,
        vision_config=dict(
            dropout_prob=0.0,
            hidden_act="gelu",
            hidden_size=WIDTH,
            image_size=SIDE,
            in_channels=3,
            intermediate_size=128,
            layer_norm_eps=1e-6,
            num_heads=2,
            num_hidden_layers=LAYERS,
            num_positions=(SIDE // PATCH) ** 2 + 1,
            patch_size=PATCH,
            scaling_factor=1,
        ),
        torch_dtype="float32",
        tie_word_embeddings=False,
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    made.save_pretrained(where)


def glm4v() -> Checkpoint:
    made, vocab = tokenizer(MARKS)
    config = hf.GlmConfig(
        **text_settings(vocab, head_dim=32, attention_bias=True),
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        rms_norm_eps=1e-5,
    )
    return Checkpoint(
        model=hf.GlmForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="".join(MARKS),
        image_ids=tuple(vocab[mark] for mark in MARKS),
        sizes=((SIDE, SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"limit_mm_per_prompt": {"image": 1}},
        single=True,
        write=partial(_write, made, vocab),
    )
