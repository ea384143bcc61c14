"""Families whose language model is DeepSeek's, a row each; `known` puts them beside the others.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.family import FROM_EMBEDDINGS, Family

ROTARY = (
    "on CPU with vLLM's native rotary embedding (custom_ops: -rotary_embedding), since vLLM 0.32's operator turns "
    "these queries wrongly there"
)
"""What stock vLLM needs on a CPU where queries of a token are not all that lies between it and the next."""


ON_DEEPSEEK = (
    Family(
        "Kimi-VL",
        ("KimiVLForConditionalGeneration",),
        ("DeepseekV2Model",),
        "one token per 28 x 28 pixels",
        "<|media_start|>, <|media_content|>, <|media_end|>",
        ("kimi_vl",),
        compared=FROM_EMBEDDINGS,
        beyond=ROTARY,
    ),
    Family(
        "Kimi-K2.5",
        ("KimiK25ForConditionalGeneration",),
        ("DeepseekV2Model",),
        "one token per 28 x 28 pixels; each chunk of a video's frames counts as a picture",
        "<|media_begin|>, <|media_content|>, <|media_end|>, a video's timestamps",
        ("kimi_k2_5",),
        compared=FROM_EMBEDDINGS,
        beyond=f"pictures, no videos; {ROTARY}",
    ),
    Family(
        "DeepSeek-VL2",
        ("DeepseekVLV2ForCausalLM",),
        ("DeepseekV2Model",),
        "the picture whole, then its tiles, with an embedding per row break and between the two",
        "nothing: row breaks are embeddings, and leave",
        ("deepseek_vl2", "deepseek_vl2_tiny"),
        compared=FROM_EMBEDDINGS,
        beyond=f"with latent attention and without; the tower, which vLLM takes from timm, made small; {ROTARY}",
    ),
    Family(
        "DeepSeek-OCR, DeepSeek-OCR-2",
        ("DeepseekOCRForCausalLM", "DeepseekOCR2ForCausalLM"),
        ("DeepseekV2Model",),
        "its tiles, then the picture whole, and an embedding behind it (DeepSeek-OCR: one per row break, too)",
        "nothing: breaks are embeddings, and leave",
        ("deepseek_ocr", "deepseek_ocr2"),
        compared=FROM_EMBEDDINGS,
        beyond="the towers, whose size vLLM fixes, made small; DeepSeek-OCR-2 without tiles",
    ),
)
