"""The grown model's vision side in numbers: tower config and projector shape. (pure)"""

from __future__ import annotations

from typing import Any

from vllm_flow.demo.grown.scenes import GRID, PATCH, SIZE

IMAGE_TOKENS = GRID * GRID
"""Image tokens per picture: 144. The tower's class token is dropped (LLaVA's ``default`` strategy)."""

TOWER_CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 768,
    "projection_dim": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
