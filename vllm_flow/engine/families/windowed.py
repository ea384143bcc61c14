"""Families whose pictures some layers see through a sliding window, one way; `known` puts them beside the others.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

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
        "EXAONE 4.5",
        ("Exaone4_5_ForConditionalGeneration",),
        ("Exaone4Model",),
        "one token per 28 x 28 pixels; sliding windows count kept tokens past the cliff",
        "<vision>, </vision>",
        ("exaone4_5",),
        compared=FROM_EMBEDDINGS,
        beyond="windows narrower than a picture",
    ),
)
