"""Families of which some layers keep no keys: states that are not Gated DeltaNet's, or nothing; `known` puts them
behind Qwen3.5's.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.decoders import lfm2_decoder, nemotron_h_decoder
from vllm_flow.engine.families.family import FROM_EMBEDDINGS, Family
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
    Family(
        "Nemotron Nano V2 VL, Nemotron 3 Omni",
        (
            "NemotronH_Nano_VL_V2",
            "NemotronH_Nano_Omni_Reasoning_V3",
            "NemotronH_Super_Omni_Reasoning_V3",
            "NemotronH_Omni_Reasoning_V3",
        ),
        ("NemotronHModel",),
        "tiles of 512 x 512 pixels and a thumbnail, 256 tokens each (Omni: one token per 32 x 32 pixels); layers of "
        "Mamba 2 take in what is left",
        "<img>, </img>",
        ("nemotron_nano_v2_vl", "nemotron_3_omni"),
        compared=FROM_EMBEDDINGS,
        beyond="the tower, whose sizes vLLM fixes, made small; what it gives, which vLLM fixes as bfloat16, in "
        "float32; experts by the test's own code, since vLLM 0.32 has none without gates on a CPU; without sound and "
        "without videos",
        adapter=nemotron_h_decoder,
    ),
    Family(
        "Cosmos3-Edge",
        ("Cosmos3EdgeForConditionalGeneration",),
        ("Cosmos3EdgeTextModel",),
        "one token per 32 x 32 pixels, M-RoPE; attention and perceptron count as a layer each",
        "<|vision_start|>, <|vision_end|>, a video's timestamps",
        ("cosmos3_edge",),
        compared=FROM_EMBEDDINGS,
        beyond="without videos; what generates pictures is not served, as in vLLM",
        adapter=nemotron_h_decoder,
    ),
)
