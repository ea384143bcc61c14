"""ERNIE 4.5-VL: each layer chooses its experts by a mask of the step's rows, a picture's or text.

Markers around a picture go to the picture's experts too, and stay past the cliff: the mask loses the rows that
the hidden states lose, no more.
"""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import inner_model


def ernie_decoder(model: Any) -> Decoder:
    """Adapter of ERNIE 4.5-VL."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), inner.norm, call="masked")
