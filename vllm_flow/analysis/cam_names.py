"""Names that the commands offer, without importing torch: hook points, dtypes, models. (pure)"""

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

READ: dict[str, str] = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "anyres",
    "LlavaOnevisionForConditionalGeneration": "anyres",
    "Qwen2VLForConditionalGeneration": "patches",
    "Qwen2_5_VLForConditionalGeneration": "patches",
    "Qwen3VLForConditionalGeneration": "patches",
    "Qwen3VLMoeForConditionalGeneration": "patches",
    "Glm4vForConditionalGeneration": "patches",
    "Glm4vMoeForConditionalGeneration": "patches",
    "GlmOcrForConditionalGeneration": "patches",
    "InternVLForConditionalGeneration": "canvas",
    "Idefics3ForConditionalGeneration": "splits",
    "SmolVLMForConditionalGeneration": "splits",
    "Mistral3ForConditionalGeneration": "rows",
}
"""Architectures that the analysis reads -> how their processor lays a picture out (`seen_kinds.KINDS`)."""

_QUERIES = (
    "its image tokens are queries that each look at the whole picture, and have no place in it"
)
_ALIKE = "use a checkpoint in the layout that transformers runs"
UNREAD: dict[str, str] = {
    "InstructBlipForConditionalGeneration": _QUERIES,
    "QWenLMHeadModel": _QUERIES,
    "QwenVLForConditionalGeneration": _QUERIES,
    "MiniCPMV": _QUERIES,
    "InternVLChatModel": f"{_ALIKE} (InternVLForConditionalGeneration, names that end in -hf)",
    "PixtralForConditionalGeneration": f"{_ALIKE} (LlavaForConditionalGeneration, Mistral3For...)",
    "Cohere2VisionForConditionalGeneration": (
        "its layers have no second norm, and most see a window of the tokens only"
    ),
}
"""Architectures that it does not, where there is more to say than that -> the reason."""
