"""Families of which some layers keep states that are not Gated DeltaNet's; `known` puts them behind Qwen3.5's.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.family import Family
from vllm_flow.engine.families.lfm2 import lfm2_decoder
from vllm_flow.engine.families.on_deepseek import ROTARY

WITH_STATES = (
    Family(
        "LFM2-VL",
        ("Lfm2VlForConditionalGeneration",),
        ("Lfm2Model",),
        "one token per 32 x 32 pixels, of a large picture tiles of 256 tokens each and a thumbnail; layers of short "
        "convolutions take in what is left",
        "<|image_start|>, <|image_end|>, the markers of tiles and thumbnail",
        ("lfm2_vl",),
        beyond=ROTARY,
        adapter=lfm2_decoder,
    ),
)
