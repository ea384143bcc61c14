"""ChatGLM's decoder, behind GLM-4V's tower: layers that take and give one tensor, by keyword."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder


def chatglm_decoder(model: Any) -> Decoder:
    """Adapter of GLM-4V."""
    inner = model.transformer.encoder
    return Decoder(inner, list(inner.layers), inner.final_layernorm, call="tensor")
