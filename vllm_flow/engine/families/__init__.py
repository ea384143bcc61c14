"""Model families: which are supported, and where a loaded one keeps its decoder layers.

The way in for the rest of the engine. To add a family: a row in ``known.py`` and a checkpoint in
``tests/families``; if its layers are called in a way of their own, an adapter in ``decoders.py``.
Everything goes by the architecture that vLLM resolved, not by what ``config.json`` lists: with
``--model-impl transformers`` they differ.
"""

from __future__ import annotations

from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.family import Family
from vllm_flow.engine.families.finding import (
    INSTEAD,
    check_call,
    check_nothing_between,
    of_stage,
    residual_decoder,
)
from vllm_flow.engine.families.known import FAMILIES, family_of
from vllm_flow.engine.families.refused import reason_against
from vllm_flow.engine.families.text_types import TEXT_TYPES

__all__ = [
    "FAMILIES",
    "UNTESTED",
    "Decoder",
    "Family",
    "check_supported",
    "decoder_of",
    "family_of",
]

UNTESTED = "untested_models"
"""The setting that allows a model that nobody has tested."""


def check_supported(model_config: Any, untested: bool = False) -> None:
    """Refuse a model that cannot evict, and, unless ``untested``, one that nobody has tested.

    Args:
        model_config: vLLM's finished ``ModelConfig``.
        untested: the setting ``untested_models``. Such a model is checked again when it is loaded.

    Raises:
        ValueError: names the architecture, the reason and the remedy.
    """
    name = model_config.architecture
    reason = reason_against(model_config)
    if reason is not None:
        raise ValueError(f"vLLM-Flow cannot evict from {name}: {reason}; {INSTEAD}.")
    problem = _untested(name, model_config.hf_text_config.model_type)
    if problem is None:
        return
    if not untested:
        raise ValueError(
            f"vLLM-Flow {problem}. {INSTEAD.capitalize()}, or set "
            f"additional_config['vllm_flow'][{UNTESTED!r}] to true to try it."
        )
    from vllm.logger import init_logger

    init_logger("vllm.vllm_flow.families").warning_once(
        "vLLM-Flow %s. It runs because %r is set: compare its answers at flow_cliff = number of "
        "layers with those of stock vLLM before relying on it.",
        problem,
        UNTESTED,
    )


def decoder_of(model: Any, model_config: Any, untested: bool = False) -> Decoder:
    """The decoder of a loaded vLLM model.

    Raises:
        ValueError: it is not where its family keeps it, or is not called as tested.
    """
    family = family_of(model_config.architecture)
    decoder = of_stage(residual_decoder(model) if family is None else family.adapter(model))
    kind = type(decoder.model).__name__
    if not untested and family is not None and family.decoders and kind not in family.decoders:
        raise ValueError(
            f"vLLM-Flow was tested with {family.name} on {_listed(family.decoders)}, but this one "
            f"has a {kind}; {INSTEAD}, or set {UNTESTED!r} to true to try it."
        )
    check_call(decoder)
    if family is None:
        check_nothing_between(decoder)
    return decoder


def _untested(architecture: str, text_type: str) -> str | None:
    """What about a model nobody has tested, to go on after "vLLM-Flow"; None if it was tested."""
    family = family_of(architecture)
    if family is None:
        return (
            f"was not tested with {architecture} (`vllm-flow models` lists what it was tested with)"
        )
    if text_type == family.own_type or not family.decoders:
        return None
    if TEXT_TYPES.get(text_type) not in family.decoders:
        return (
            f"was tested with {family.name} on {_listed(family.decoders)}, but the language model "
            f"of this one is of the type {text_type!r}"
        )
    return None


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
