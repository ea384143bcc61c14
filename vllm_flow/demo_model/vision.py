"""The demo model's vision side in numbers: tower config, pixel normalisation, projector shape. (pure)"""

from __future__ import annotations

from typing import Any

from vllm_flow.demo_model.scenes import GRID, PATCH, SIZE

IMAGE_TOKENS = GRID * GRID
"""Image tokens per picture: 144. The tower's class token is dropped (LLaVA's ``default`` strategy)."""

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's channel means and deviations, for values in [0, 1]."""

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

FEATURE_LAYER = -1
"""LLaVA's ``vision_feature_layer``: the last layer's output, before the tower's post-norm."""
