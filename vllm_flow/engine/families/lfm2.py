"""LFM2: short convolutions and attention in turn, called by the names of their arguments; its norm has another name."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder


def lfm2_decoder(model: Any) -> Decoder:
    """Adapter of LFM2-VL."""
    inner = model.language_model.model
    return Decoder(inner, list(inner.layers), inner.embedding_norm, call="named")
