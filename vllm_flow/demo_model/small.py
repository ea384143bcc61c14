"""The small model for fast tests, in numbers: the demo model's tower, and six Llama layers from scratch.

It answers presence questions from the picture like the demo model, but it moves the image's content
in its first layers: it says nothing about where a cliff is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_flow.demo_model.scenes import GRID
from vllm_flow.demo_model.vision import TOWER_CONFIG

SMALL_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 992,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""The vocabulary is a cut of SmolLM2's: same special tokens, same image token, and class
names in the same pieces."""

SMALL_GRID = 8
SMALL_IMAGE_TOKENS = SMALL_GRID * SMALL_GRID
"""Image tokens per picture: 64, of pictures of 112 pixels."""

POSITIONS: tuple[int, ...] = tuple(
    round((place + 0.5) * GRID / SMALL_GRID - 0.5) for place in range(SMALL_GRID)
)
"""Rows, and columns, of the tower's grid whose position embeddings the smaller grid takes."""


def small_tower(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tower's config and tensors for pictures of 112 pixels.

    The same weights but for the position embeddings: of [1 + 144, width] the class token's row and the
    64 of ``POSITIONS`` stay. Rows are picked, not mixed, so that every machine makes the same checkpoint.
    """
    config = {**TOWER_CONFIG, "image_size": SMALL_GRID * TOWER_CONFIG["patch_size"]}
    rows = [0] + [1 + row * GRID + column for row in POSITIONS for column in POSITIONS]
    return config, {
        name: tensor[rows] if name.endswith("position_embedding.weight") else tensor
        for name, tensor in weights.items()
    }
