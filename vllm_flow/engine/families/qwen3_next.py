"""Qwen3.5: layers of linear and of full attention in turn, called by the names of their arguments."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import inner_model


def named_decoder(model: Any) -> Decoder:
    """Adapter of language models that are Qwen3-Next's kind, dense and mixture of experts."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), inner.norm, call="named")
