"""Aria: its language model is the decoder itself, the head beside it."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import inner_model


def aria_decoder(model: Any) -> Decoder:
    """Adapter of Aria."""
    inner = inner_model(model, ("language_model",))
    return Decoder(inner, list(inner.layers), inner.norm)
