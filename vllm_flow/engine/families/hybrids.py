"""Decoders of layers with states and with attention, called by the names of their arguments; norms with other names."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder


def lfm2_decoder(model: Any) -> Decoder:
    """Adapter of LFM2-VL."""
    inner = model.language_model.model
    return Decoder(inner, list(inner.layers), inner.embedding_norm, call="named")


def nemotron_h_decoder(model: Any) -> Decoder:
    """Adapter of Nemotron-H behind a tower, and of Cosmos3-Edge, whose layers are Nemotron-H's without states."""
    inner = model.language_model.model
    return Decoder(inner, list(inner.layers), inner.norm_f, call="named")
