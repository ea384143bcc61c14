"""Step-3.7: layers that take and give one tensor, and a final norm that runs with the logits, behind the decoder."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import inner_model


def step_decoder(model: Any) -> Decoder:
    """Adapter of Step-3.7."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), None, call="plain")
