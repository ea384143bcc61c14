"""Model families: where a vision-language model keeps its decoder layers and final norm.

A family is an adapter of a few lines. The decoder hook needs ``layer(positions, hidden_states,
residual) -> (hidden_states, residual)`` and ``norm(hidden_states, residual)``; a family whose
decoder is called differently wraps it here. To add one: write a function from the model to a
:class:`Decoder`, register it, and add its shape to ``tests/engine``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Decoder:
    """The parts of a language model that the hook wraps, shallowest layer first."""

    layers: Sequence[nn.Module]
    norm: nn.Module


Adapter = Callable[[Any], Decoder]
_ADAPTERS: dict[str, Adapter] = {}

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")
"""Decoder classes whose layers have the signature above, as tested."""


def register(architecture: str, adapter: Adapter) -> None:
    """Make a model architecture (``config.json``'s ``architectures``) known."""
    _ADAPTERS[architecture] = adapter


def supported() -> list[str]:
    """Architectures with an adapter, sorted."""
    return sorted(_ADAPTERS)


def check_supported(architectures: Sequence[str]) -> None:
    """Raises ValueError, naming what is supported, unless one of the architectures is known."""
    if not set(architectures) & _ADAPTERS.keys():
        raise ValueError(
            f"vLLM-Flow has no adapter for {', '.join(architectures)}; it supports "
            f"{', '.join(supported())}. Serve this model without additional_config['vllm_flow']."
        )


def decoder_of(model: Any, architectures: Sequence[str]) -> Decoder:
    """The decoder of a loaded vLLM model."""
    check_supported(architectures)
    adapter = next(_ADAPTERS[name] for name in architectures if name in _ADAPTERS)
    return adapter(model)


def _llava(model: Any) -> Decoder:
    """LLaVA-1.5 and -NeXT: a causal language model behind ``get_language_model()``."""
    inner = model.get_language_model().model
    if type(inner).__name__ not in DECODERS:
        raise ValueError(
            f"vLLM-Flow evicts from {', '.join(DECODERS)} decoders, but this LLaVA has a "
            f"{type(inner).__name__}; serve it without additional_config['vllm_flow']."
        )
    return Decoder(layers=list(inner.layers), norm=inner.norm)


register("LlavaForConditionalGeneration", _llava)
register("LlavaNextForConditionalGeneration", _llava)
