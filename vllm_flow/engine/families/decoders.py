"""Adapters: where the decoder is, and how its layers are called, in families that differ from the usual one.

Each takes a loaded model of vLLM's and returns its `Decoder`. The usual one is `finding.residual_decoder`; what the
values of ``call`` mean stands in `decoder_parts`.
"""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import inner_model

DEEPSTACK = "deepstack_input_embeds"
"""The argument that carries image features of deeper tower layers, which are added to the hidden states between layers.

One tensor per injection, [T, H], zero on text rows. Past the cliff, where text rows alone are left, it must lose the
same rows: the hook puts a proxy in the argument's place. The tensors are views of a buffer that vLLM keeps, and stay
as they are.
"""


def deepstack_decoder(model: Any) -> Decoder:
    """Qwen3-VL's line, dense and mixture of experts."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), inner.norm, injected=DEEPSTACK)


def granite_decoder(model: Any) -> Decoder:
    """Granite 4 Vision: layers take and return one tensor, and image features are added before a layer."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), inner.norm, call="plain", injected=DEEPSTACK)


def named_decoder(model: Any) -> Decoder:
    """Qwen3.5: layers of linear and of full attention in turn, called by the names of their arguments."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), inner.norm, call="named")


def lfm2_decoder(model: Any) -> Decoder:
    """LFM2-VL: layers of short convolutions and of attention, called by name; the norm has another name."""
    inner = model.language_model.model
    return Decoder(inner, list(inner.layers), inner.embedding_norm, call="named")


def nemotron_h_decoder(model: Any) -> Decoder:
    """Nemotron-H behind a tower, and Cosmos3-Edge, whose layers are Nemotron-H's without states."""
    inner = model.language_model.model
    return Decoder(inner, list(inner.layers), inner.norm_f, call="named")


def ernie_decoder(model: Any) -> Decoder:
    """ERNIE 4.5-VL: each layer chooses experts by a mask of the step's rows, which says whether one is a picture's.

    Markers around a picture go to the picture's experts too, and stay past the cliff. So the mask loses the rows that
    the hidden states lose, and no others.
    """
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), inner.norm, call="masked")


def aria_decoder(model: Any) -> Decoder:
    """Aria: the language model is the decoder itself, with the head beside it."""
    inner = inner_model(model, ("language_model",))
    return Decoder(inner, list(inner.layers), inner.norm)


def step_decoder(model: Any) -> Decoder:
    """Step-3.7: layers take and return one tensor; the final norm runs with the logits, after the decoder."""
    inner = inner_model(model)
    return Decoder(inner, list(inner.layers), None, call="plain")


def chatglm_decoder(model: Any) -> Decoder:
    """GLM-4V, whose decoder is ChatGLM's: layers take and return one tensor, by keyword."""
    inner = model.transformer.encoder
    return Decoder(inner, list(inner.layers), inner.final_layernorm, call="tensor")


def opt_decoder(model: Any) -> Decoder:
    """BLIP-2, whose decoder is OPT: positions are added before it, and layers take hidden states alone.

    The smallest OPT has no norm behind its layers.
    """
    inner = model.language_model.model.decoder
    return Decoder(inner, list(inner.layers), inner.final_layer_norm, call="alone")
