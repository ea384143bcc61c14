"""Families in which the tokens of a picture see one another in both directions; `known` puts them beside the others.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.family import FROM_EMBEDDINGS, Family

BOTH_WAYS = (
    Family(
        "Gemma 3",
        ("Gemma3ForConditionalGeneration",),
        ("Gemma3Model",),
        "256 tokens, and as many for each crop, which see one another in both directions: on CUDA, with Triton "
        "attention; sliding windows count kept tokens past the cliff",
        "<start_of_image>, <end_of_image>, the line breaks around them",
        ("gemma3",),
        beyond="on CPU through Triton's interpreter, and on an H100",
    ),
    Family(
        "Gemma 4 without embeddings per layer (31B, 26B-A4B, 12B)",
        ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        ("Gemma4Model",),
        "one token per 48 x 48 pixels, which see one another in both directions where a layer has a sliding window: "
        "on CUDA, with Triton attention; such windows count kept tokens past the cliff",
        "the markers around the picture",
        ("gemma4", "gemma4_moe", "gemma4_unified"),
        beyond="on CPU through Triton's interpreter, and on no GPU; pictures no wider than a window; a storage group "
        "per layer, since layers' keys differ in size; the 12B with the masks of transformers' generation",
    ),
    Family(
        "Molmo 2",
        ("Molmo2ForConditionalGeneration",),
        ("Molmo2TextModel",),
        "the picture whole, then its tiles, with an embedding per row break, between embeddings; a picture sees itself "
        "in both directions, of a video each frame: on CUDA, with Triton attention",
        "a video's timestamps; markers and row breaks are embeddings, and leave",
        ("molmo2_qwen3", "molmo2_olmo3", "molmo2_video"),
        compared=FROM_EMBEDDINGS,
        beyond="on CPU through Triton's interpreter, and on no GPU",
    ),
)
