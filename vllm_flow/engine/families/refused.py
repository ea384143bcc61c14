"""Models that cannot evict image tokens, and why. Knows what vLLM's ``ModelConfig`` says of a model."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine import states

_PER_LAYER_EMBEDDINGS = (
    "its layers add embeddings of their own for every token of the step, and share keys and values "
    "between layers"
)
_VISION_CHUNK = (
    "its images arrive as a modality of their own, 'vision_chunk', which no policy reaches"
)
_BOTH_WAYS = (
    "the tokens of a picture attend to one another in both directions, which was compared past a cliff "
    "with Gemma 3 alone"
)
_PREFIX = (
    "the tokens of a picture and of the prompt attend to one another in both directions, in vLLM those of "
    "the picture alone, so that transformers' answers are no reference"
)
_ROWS_OVER_WORKERS = (
    "DeepSeek's decoder tells by the number of rows whether they are spread over workers"
)
_NO_PICTURES = "it takes neither pictures nor videos, so that there is nothing to evict"

BY_NAME = {
    "DeepseekVLV2ForCausalLM": (
        f"{_ROWS_OVER_WORKERS}, and its larger models store multi-head latent attention, which has no "
        "packed storage yet"
    ),
    "DeepseekOCRForCausalLM": _ROWS_OVER_WORKERS,
    "DeepseekOCR2ForCausalLM": _ROWS_OVER_WORKERS,
    "UnlimitedOCRForCausalLM": _ROWS_OVER_WORKERS,
    "Ernie4_5_VLMoeForConditionalGeneration": (
        "its layers choose their experts by a mask of the picture's rows in the whole step"
    ),
    "BagelForConditionalGeneration": _BOTH_WAYS,
    "Molmo2ForConditionalGeneration": _BOTH_WAYS,
    "Moondream3ForCausalLM": _BOTH_WAYS,
    "HfMoondream": _BOTH_WAYS,
    "PaliGemmaForConditionalGeneration": _PREFIX,
    "Gemma3nForConditionalGeneration": _PER_LAYER_EMBEDDINGS,
    "Gemma4ForConditionalGeneration": _PER_LAYER_EMBEDDINGS,
    "Gemma4UnifiedForConditionalGeneration": _PER_LAYER_EMBEDDINGS,
    "KimiK25ForConditionalGeneration": _VISION_CHUNK,
    "KimiK3ForConditionalGeneration": _VISION_CHUNK,
    "Llama4ForConditionalGeneration": "its chunked local attention goes by position in the prompt",
    "Granite4VisionForConditionalGeneration": "it adds image features before its layers",
    "DiffusionGemmaForBlockDiffusion": "it answers by diffusion, block by block",
    **dict.fromkeys(
        (
            "AudioFlamingo3ForConditionalGeneration",
            "FireRedASR2ForConditionalGeneration",
            "FunASRForConditionalGeneration",
            "FunAudioChatForConditionalGeneration",
            "GlmAsrForConditionalGeneration",
            "GraniteSpeechForConditionalGeneration",
            "GraniteSpeechPlusForConditionalGeneration",
            "MiDashengLMModel",
            "MoonshotKimiaForCausalLM",
            "MossAudioModel",
            "MossTranscribeDiarizeForConditionalGeneration",
            "Qwen2AudioForConditionalGeneration",
            "Qwen3ASRForConditionalGeneration",
            "Qwen3ASRRealtimeGeneration",
            "UltravoxModel",
            "VoxtralForConditionalGeneration",
            "VoxtralRealtimeGeneration",
        ),
        _NO_PICTURES,
    ),
}
"""Architecture -> why not."""


def reason_against(model_config: Any) -> str | None:
    """Why a model cannot evict, None if nothing is known against it."""
    by_name = BY_NAME.get(model_config.architecture)
    if by_name is not None:
        return by_name
    if model_config.is_attention_free or (
        model_config.is_hybrid and not states.attending(model_config)
    ):
        return (
            "it has layers of convolutions or state spaces, whose states were not tested with fewer rows "
            "past a cliff"
        )
    if model_config.use_mla:
        return "it stores multi-head latent attention, which has no packed storage yet"
    return None
