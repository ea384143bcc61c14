"""OPT's decoder, behind BLIP-2's tower: positions are added to what comes in, and layers take hidden states alone."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder


def opt_decoder(model: Any) -> Decoder:
    """Adapter of BLIP-2. The smallest OPT has no norm behind its layers."""
    inner = model.language_model.model.decoder
    return Decoder(inner, list(inner.layers), inner.final_layer_norm, call="alone")
