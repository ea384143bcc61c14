"""The small decoder for fast tests, in numbers: six Llama layers trained from scratch. (pure)

It answers presence questions from the picture like the demo model, but it moves the image's content
in its first layers: it says nothing about where a cliff is.
"""

from __future__ import annotations

from typing import Any

SMALL_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 864,
    "hidden_size": 192,
    "intermediate_size": 512,
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
"""The vocabulary is a cut of SmolLM2's: same special tokens, same image token, whole class names."""
