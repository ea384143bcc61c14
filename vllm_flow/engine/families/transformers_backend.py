"""vLLM's Transformers modelling backend: a model of Hugging Face's around vLLM's attention.

Chosen by what vLLM loaded (``--model-impl transformers``, or a model that vLLM has no class for),
never by ``config.json``.
"""

from __future__ import annotations

import inspect
from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import inner_model

PATHS = ("model.language_model", "model.text_model", "model")


def transformers_decoder(model: Any) -> Decoder:
    """Adapter of every family in the backend.

    Raises:
        ValueError: the language model adds image features between its layers by position in the
            whole step.
    """
    inner = inner_model(model, PATHS)
    if "deepstack_visual_embeds" in inspect.signature(type(inner).forward).parameters:
        raise ValueError(
            f"vLLM-Flow cannot evict from {type(inner).__name__} in vLLM's Transformers backend: it "
            "adds image features between its layers; leave out model_impl (--model-impl), so that "
            "vLLM's own model is used."
        )
    return Decoder(inner, list(inner.layers), inner.norm, call="batched")
