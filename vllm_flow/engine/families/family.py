"""What a row of the registry says of a family. Knows neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import residual_decoder

FROM_EMBEDDINGS = "transformers' language model, from vLLM's embeddings"
"""What families are compared with that transformers has no tower for."""


@dataclass(frozen=True)
class Family:
    """One row: a kind of model, and what eviction means for it."""

    name: str
    architectures: tuple[str, ...]
    """As vLLM resolves them."""
    decoders: tuple[str, ...]
    """Classes of vLLM that run the layers, as tested; empty where the architecture allows any."""
    layout: str
    """What a picture becomes in the prompt."""
    stays: str
    """What of it is text, and so never leaves."""
    checkpoints: tuple[str, ...]
    """Tiny checkpoints of ``tests/families`` that the row was tested on."""
    compared: str = "transformers' forward"
    """What the answers past a cliff were compared with."""
    beyond: str = ""
    """What else was tried: a real checkpoint, a GPU."""
    own_type: str = ""
    """The ``model_type`` of a configuration that does not say which language model it is for: which one it
    is, is seen when the model is loaded."""
    adapter: Callable[[Any], Decoder] = residual_decoder
