"""Qwen3-VL, Granite 4 Vision: image features of deeper tower layers are added to the hidden states between layers.

vLLM hands its language model one tensor per injection, [T, H], zero on text rows. Past the cliff
only the text rows are left, so what is injected there must lose the same rows: the hook puts a proxy
in the argument's place. The tensors themselves are views of a buffer that vLLM keeps, and stay as
they are.
"""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import inner_model


def deepstack_decoder(model: Any) -> Decoder:
    """Adapter of the Qwen3-VL family, dense and mixture of experts."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), inner.norm, injected="deepstack_input_embeds")


def granite_decoder(model: Any) -> Decoder:
    """Adapter of Granite 4 Vision, whose layers take and give one tensor, and which adds before a layer."""
    inner = inner_model(model)
    layers = list(inner.layers)
    return Decoder(inner, layers, inner.norm, call="plain", injected="deepstack_input_embeds")
