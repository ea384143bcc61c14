"""Families of LLaVA's line, a row each; `known` puts them before the others.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.family import FROM_EMBEDDINGS, Family

LLAVA_LINE = (
    Family(
        "LLaVA-1.5, Pixtral",
        ("LlavaForConditionalGeneration",),
        ("LlamaModel", "MistralModel", "Qwen2Model"),
        "one token per patch (Pixtral: rows of the picture's own size)",
        "Pixtral's [IMG_BREAK] and [IMG_END]",
        ("llava", "pixtral"),
        beyond="the demo model, a trained checkpoint",
    ),
    Family(
        "LLaVA-NeXT (1.6)",
        ("LlavaNextForConditionalGeneration",),
        ("LlamaModel", "MistralModel", "Qwen2Model"),
        "the picture whole, then its tiles with an embedding per row break",
        "nothing: row breaks are embeddings, and leave",
        ("llava_next",),
    ),
    Family(
        "LLaVA-NeXT-Video",
        ("LlavaNextVideoForConditionalGeneration",),
        ("LlamaModel", "MistralModel"),
        "of a video's frames one token per 2 x 2 patches; pictures are not taken, as in vLLM",
        "nothing",
        ("llava_next_video",),
        compared=FROM_EMBEDDINGS,
    ),
    Family(
        "LLaVA-OneVision",
        ("LlavaOnevisionForConditionalGeneration",),
        ("Qwen2Model",),
        "the picture whole, then its tiles with an embedding per row break",
        "nothing: row breaks are embeddings, and leave",
        ("llava_onevision", "llava_onevision_video"),
        beyond="videos, from vLLM's embeddings on",
    ),
    Family(
        "R-4B, Bee",
        ("RForConditionalGeneration", "BeeForConditionalGeneration"),
        ("Qwen3Model",),
        "the picture whole, then its tiles with an embedding per row break",
        "nothing: row breaks are embeddings, and leave",
        ("r_4b", "bee"),
        compared=FROM_EMBEDDINGS,
    ),
    Family(
        "LLaVA-OneVision 2",
        ("LlavaOnevision2ForConditionalGeneration",),
        ("Qwen3Model",),
        "one token per 28 x 28 pixels",
        "<|vision_start|>, <|vision_end|>, a video's timestamps",
        ("llava_onevision2",),
        compared=FROM_EMBEDDINGS,
        beyond="without videos",
    ),
)
