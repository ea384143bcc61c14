"""Families whose pictures some layers see through a sliding window or chunk by chunk, one way.

`known` puts them beside the others.
Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.decoders import deepstack_decoder, step_decoder
from vllm_flow.engine.families.family import FROM_EMBEDDINGS, Family

WINDOWED = (
    Family(
        "Command-A-Vision",
        ("Cohere2VisionForConditionalGeneration",),
        ("CohereModel",),
        "tiles of 512 x 512 pixels and a thumbnail, 256 tokens each; sliding windows count kept tokens past the cliff",
        "<|START_OF_IMG|>, <|END_OF_IMG|>, <|IMG_LINE_BREAK|> behind each tile",
        ("cohere2_vision",),
        beyond="windows narrower than a picture",
    ),
    Family(
        "North Micro Vision",
        ("CohereCompassForConditionalGeneration",),
        ("CohereCompassTextModel",),
        "one token per 32 x 32 pixels, M-RoPE; deeper features are added between layers up to the cliff, past which "
        "sliding windows count kept tokens",
        "<|VISION_START|>, <|VISION_END|>",
        ("cohere_compass",),
        compared="transformers' forward with vLLM's order of M-RoPE's frequencies",
        beyond="windows narrower than a picture",
        adapter=deepstack_decoder,
    ),
    Family(
        "Llama 4",
        ("Llama4ForConditionalGeneration",),
        ("Llama4Model",),
        "tiles of 336 x 336 pixels, then the picture whole, 144 tokens each; chunks of local attention count kept "
        "tokens past the cliff",
        "the markers around the picture, between its tiles, and before the picture whole",
        ("llama4",),
        beyond="chunks shorter than a picture; queries scaled by their position, as vLLM does from a max_model_len "
        "of 32K on; on CPU vLLM 0.32 multiplies a view that it cannot, of which the test makes a copy",
    ),
    Family(
        "Muse Glimmer",
        ("MuseGlimmerForConditionalGeneration",),
        ("MuseGlimmerModel",),
        "one token per 28 x 28 pixels; sliding windows count kept tokens past the cliff",
        "<|image_start|>, <|image_end|>",
        ("muse_glimmer",),
        compared=FROM_EMBEDDINGS,
        beyond="windows narrower than a picture; without videos",
    ),
    Family(
        "EXAONE 4.5",
        ("Exaone4_5_ForConditionalGeneration",),
        ("Exaone4Model",),
        "one token per 28 x 28 pixels; sliding windows count kept tokens past the cliff",
        "<vision>, </vision>",
        ("exaone4_5",),
        compared=FROM_EMBEDDINGS,
        beyond="windows narrower than a picture",
    ),
    Family(
        "Step-3.7",
        ("Step3p7ForConditionalGeneration",),
        ("Step3p5Model",),
        "crops of a long or large picture, 81 tokens each, then the picture whole, 169 tokens; sliding windows count "
        "kept tokens past the cliff",
        "the markers around each crop, at the end of a row, and around the picture",
        ("step3_7",),
        compared=FROM_EMBEDDINGS,
        beyond="windows narrower than a picture; the picture, whose size vLLM fixes, made small; on CPU vLLM 0.32 "
        "multiplies a view that it cannot, of which the test makes a copy, and routes by a sigmoid among groups of "
        "experts alone, of which the test has one",
        adapter=step_decoder,
    ),
    Family(
        "MiMo-V2-Omni",
        ("MiMoV2OmniForCausalLM",),
        ("MiMoV2Model",),
        "one token per 32 x 32 pixels; sliding windows, whose layers have sinks of attention, count kept tokens past "
        "the cliff",
        "<|vision_start|>, <|vision_end|>; sound",
        ("mimo_v2_omni", "mimo_v2_omni_narrow"),
        compared=FROM_EMBEDDINGS,
        beyond="windows narrower than a picture; values as wide as keys on a CPU's backend, and narrower ones, as "
        "published, with TRITON_ATTN_DIFFKV through Triton's interpreter; the tower, whose windows vLLM runs through "
        "Triton alone, without them; a storage group per layer, since layers' keys differ in size; without sound and "
        "without videos",
    ),
)
