"""Names that the command line offers, without importing torch: hook points and dtypes. (pure)"""

from __future__ import annotations

HOOKS: dict[str, tuple[str, str]] = {
    "post_attention_norm": ("post_attention_layernorm", "output"),
    "input_norm": ("input_layernorm", "output"),
    "attention": ("self_attn", "output"),
    "mlp": ("mlp", "output"),
    "layer_input": ("", "input"),
    "layer_output": ("", "output"),
}
"""Hook point -> submodule of a decoder layer ("" is the layer itself), and which end of it."""

DEFAULT_HOOK = "post_attention_norm"

DTYPES = ("float32", "bfloat16", "float16")
