"""What EAGLE-3 reads between the target's layers, in a step in which rows leave there.

Seam: ``_maybe_add_hidden_state`` of vLLM's ``EagleModelMixin``, by which a decoder collects hidden states between
its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COLLECTS = "_maybe_add_hidden_state"
"""vLLM's method of a decoder that keeps hidden states between layers."""


def reads_between_layers(config: Any) -> bool:
    """Whether the drafter is given hidden states from between the target's layers."""
    speculative = config.speculative_config
    if speculative is None or speculative.method != "eagle3":
        return False
    eagle = getattr(speculative.draft_model_config.hf_config, "eagle_config", None) or {}
    return bool(eagle.get("use_aux_hidden_state", True))


def collector(
    decoder: Any, whole: Callable[[torch.Tensor], torch.Tensor]
) -> list[tuple[Any, Callable[..., Any]]]:
    """What takes the place of a decoder's :data:`COLLECTS` in a step in which rows leave, as `replacing` takes it.

    Args:
        decoder: the module that runs the layers.
        whole: of a tensor of the rows alive one of all the step's, [R, H] -> [T, H].
    """
    own = getattr(decoder, COLLECTS, None)
    if own is None:
        return []

    def collect(
        collected: Any, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> Any:
        if layer not in decoder.aux_hidden_state_layers:
            return collected
        kept = hidden if residual is None else hidden + residual
        return own(collected, layer, whole(kept), None)

    return [(decoder, collect)]


def check_collects(decoder: Any) -> None:
    """Refuse EAGLE-3 where a decoder collects hidden states in a way of its own.

    Args:
        decoder: see :class:`vllm_flow.engine.families.decoder_parts.Decoder`.

    Raises:
        ValueError: names the class, and what to do.
    """
    if decoder.norm is None or not hasattr(decoder.model, COLLECTS):
        raise ValueError(
            f"vLLM-Flow does not know how {type(decoder.model).__name__} collects what EAGLE-3 reads between its "
            "layers: set the method of speculative_config to 'eagle' or 'ngram', or leave it out."
        )
