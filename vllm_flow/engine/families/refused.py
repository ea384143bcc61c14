"""Models that cannot evict image tokens, and why. Knows what vLLM's ``ModelConfig`` says of a model."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine import states

_PER_LAYER_EMBEDDINGS = (
    "its layers add embeddings of their own for every token of the step, and share keys and values "
    "between layers, so that one past the cliff would read a picture's from before it"
)
_BOTH_WAYS = (
    "the tokens of a picture attend to one another in both directions, which was compared past a cliff "
    "with Gemma 3 and 4 and with Molmo 2 alone"
)
_PREFIX = (
    "the tokens of a picture and of the prompt attend to one another in both directions, in vLLM those of "
    "the picture alone, so that transformers' answers are no reference"
)
_NO_PICTURES = "it takes neither pictures nor videos, so that there is nothing to evict"

_INDEX = "its layers choose the tokens that they attend to by an index with a cache of its own"

_OF_ALL_LAYERS = ("hidden_size_per_layer_input", "num_kv_shared_layers")
"""Keys of a language model's configuration, of which either says so."""

BY_NAME = {
    "UnlimitedOCRForCausalLM": (
        "the tokens of its answers see the last of one another alone, beside the prompt, and the others are freed"
    ),
    "BagelForConditionalGeneration": _BOTH_WAYS,
    "Moondream3ForCausalLM": _BOTH_WAYS,
    "HfMoondream": _BOTH_WAYS,
    "PaliGemmaForConditionalGeneration": _PREFIX,
    "Gemma3nForConditionalGeneration": _PER_LAYER_EMBEDDINGS,
    "KimiK3ForConditionalGeneration": (
        "it has layers of linear attention, whose state mixes all tokens, beside those of latent attention"
    ),
    "MiniMaxM3SparseForConditionalGeneration": _INDEX,
    "NemotronParseForConditionalGeneration": (
        "its decoder looks at the picture by cross-attention, so that no image token is among its rows"
    ),
    "DiffusionGemmaForBlockDiffusion": "it answers by diffusion, block by block",
    **dict.fromkeys(
        (
            "AudioFlamingo3ForConditionalGeneration",
            "CohereAsrForConditionalGeneration",
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
            "WhisperForConditionalGeneration",
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
        return "it has layers that keep states of a kind that was not tested with fewer rows past a cliff"
    text = model_config.hf_text_config
    if hasattr(text, "index_topk"):
        return _INDEX
    if any(getattr(text, name, None) for name in _OF_ALL_LAYERS):  # Gemma 4's E2B and E4B
        return _PER_LAYER_EMBEDDINGS
    return None
