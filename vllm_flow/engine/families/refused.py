"""Models that cannot evict image tokens, and why. Knows what vLLM's ``ModelConfig`` says of a model."""

from __future__ import annotations

from typing import Any

_PER_LAYER_EMBEDDINGS = (
    "its layers add embeddings of their own for every token of the step, and share keys and values "
    "between layers"
)
_VISION_CHUNK = (
    "its images arrive as a modality of their own, 'vision_chunk', which no policy reaches"
)
_WINDOWS_AND_PREFIX = (
    "the tokens of a picture attend to one another in both directions, and its sliding windows go by "
    "position, of which packed storage keeps only the order"
)
_PREFIX = "the tokens of a picture and of the prompt attend to one another in both directions"

BY_NAME = {
    "DeepseekVLV2ForCausalLM": (
        "DeepSeek-V2's decoder tells by the number of rows whether they are spread over workers, and "
        "its larger models store multi-head latent attention, which has no packed storage yet"
    ),
    "Gemma3ForConditionalGeneration": _WINDOWS_AND_PREFIX,
    "PaliGemmaForConditionalGeneration": _PREFIX,
    "Gemma3nForConditionalGeneration": _PER_LAYER_EMBEDDINGS,
    "Gemma4ForConditionalGeneration": _PER_LAYER_EMBEDDINGS,
    "Gemma4UnifiedForConditionalGeneration": _PER_LAYER_EMBEDDINGS,
    "KimiK25ForConditionalGeneration": _VISION_CHUNK,
    "KimiK3ForConditionalGeneration": _VISION_CHUNK,
    "Llama4ForConditionalGeneration": "its chunked local attention goes by position in the prompt",
    "Granite4VisionForConditionalGeneration": "it adds image features before its layers",
}
"""Architecture -> why not."""


def reason_against(model_config: Any) -> str | None:
    """Why a model cannot evict, None if nothing is known against it."""
    by_name = BY_NAME.get(model_config.architecture)
    if by_name is not None:
        return by_name
    if model_config.is_hybrid or model_config.is_attention_free:
        return (
            "it has layers of linear attention, convolutions or state spaces, whose state mixes all "
            "tokens, so that none can leave"
        )
    if model_config.use_mla:
        return "it stores multi-head latent attention, which has no packed storage yet"
    return None
