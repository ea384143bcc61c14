"""Families whose language model is Qwen3.5's, a row each; `known` puts them behind it.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.decoders import named_decoder
from vllm_flow.engine.families.family import Family

ON_QWEN3_5 = (
    Family(
        "Intern-S2-Preview, -Mobius",
        ("InternS2PreviewForConditionalGeneration", "InternS2MobiusForConditionalGeneration"),
        ("Qwen3_5Model", "InternS2MobiusModel"),
        "one token per 32 x 32 pixels, M-RoPE; layers of linear attention take in what is left",
        "<|vision_start|>, <|vision_end|>, a video's timestamps",
        ("interns2_preview", "interns2_mobius"),
        beyond="without videos, and without time series, as in vLLM; Mobius against Qwen3.5 with layers that share "
        "experts",
        adapter=named_decoder,
    ),
    Family(
        "MiniCPM-V 4.6, 4.7",
        ("MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration"),
        ("Qwen3_5Model",),
        "the picture whole, then its slices, one token per 56 x 56 pixels, in 4.7 with M-RoPE; layers of linear "
        "attention take in what is left",
        "the markers around each slice, line breaks between their rows, and the picture's number",
        ("minicpm_v_4_6", "minicpm_v_4_7"),
        beyond="without videos",
        adapter=named_decoder,
    ),
)
