"""Finding the decoder in a loaded vLLM model, and checking that its layers are called as tested.

Seam: vLLM's habit of keeping layers and final norm side by side in one module. Knows no family.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_flow.engine.families.decoder_parts import Decoder

PATHS = ("language_model.model", "llm.model", "model.text_model", "model.language_model", "model")
"""Where the decoder may be, from the outermost module; the first that holds layers is taken."""

RESIDUAL = ("positions", "hidden_states", "residual")
SCALED = (*RESIDUAL, "llama_4_scaling")
FIRST: dict[str, tuple[str, ...]] = {
    "residual": RESIDUAL,
    "named": RESIDUAL,
    "scaled": SCALED,
    "masked": (*RESIDUAL, "visual_token_mask"),
    "plain": RESIDUAL[:2],
    "alone": RESIDUAL[1:2],
}
"""Call -> the parameters with which a layer's ``forward`` begins: in this order, or ``named`` in any."""

USUAL = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")
"""Parameters of the module that runs the layers, where it adds nothing between them."""

INSTEAD = "serve this model without additional_config['vllm_flow']"
"""The remedy in refusals of models."""


def inner_model(model: Any, paths: Sequence[str] = PATHS) -> Any:
    """The module with ``layers`` and ``norm``.

    Raises:
        ValueError: there is none under these paths.
    """
    for path in paths:
        found = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if len(getattr(found, "layers", ())) and hasattr(found, "norm"):
            return found
    raise ValueError(
        f"vLLM-Flow finds no decoder layers in {type(model).__name__} (looked at "
        f"{', '.join(paths)}); serve it without additional_config['vllm_flow']."
    )


def residual_decoder(model: Any) -> Decoder:
    """The usual family: a language model of vLLM behind a tower, nothing between its layers."""
    inner = inner_model(model)
    scaled = all(
        _parameters(type(layer))[:4] == SCALED for layer in _present(inner.layers).values()
    )
    return Decoder(inner, list(inner.layers), inner.norm, call="scaled" if scaled else "residual")


def of_stage(decoder: Decoder) -> Decoder:
    """The decoder with the layers that this worker has, of a pipeline some."""
    here = _present(decoder.layers)
    last = max(here) == len(decoder.layers) - 1
    return replace(decoder, layers=list(here.values()), first_layer=min(here), hands_on=not last)


def _present(layers: Sequence[Any]) -> dict[int, Any]:
    """Number -> layer, of those that are not another pipeline stage's."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return {
        number: layer
        for number, layer in enumerate(layers)
        if not isinstance(layer, PPMissingLayer)
    }


def check_call(decoder: Decoder) -> None:
    """Refuse layers whose ``forward`` is not called as the hook calls it.

    Raises:
        ValueError: names the layer and its parameters.
    """
    first = FIRST.get(decoder.call)
    if first is None:
        return
    for kind in {type(layer) for layer in decoder.layers}:
        found = _parameters(kind)
        if not (_named(kind, first) if decoder.call == "named" else found[: len(first)] == first):
            raise ValueError(
                f"vLLM-Flow calls decoder layers with ({', '.join(first)}), but {kind.__name__} "
                f"takes ({', '.join(found)}); {INSTEAD}."
            )


def _named(kind: type[Any], wanted: Sequence[str]) -> bool:
    """Whether a layer's ``forward`` begins with these in any order, or takes any others by name."""
    every = list(inspect.signature(kind.forward).parameters.values())[1:]
    others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in every)
    begins = [parameter.name for parameter in every[: len(wanted)]]
    return set(wanted) == set(begins) or (others and set(begins[:-1]) <= set(wanted))


def _parameters(kind: type[Any]) -> tuple[str, ...]:
    """Of a layer's ``forward``."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def check_nothing_between(decoder: Decoder) -> None:
    """Refuse a model that nobody has tested if it may add something between its layers.

    What it adds has the rows of the whole step. Where a single one is left past the cliff, an
    addition would broadcast and nobody would notice.

    Raises:
        ValueError: names the argument.
    """
    kind = type(decoder.model)
    known = (*USUAL, decoder.injected)
    strange = [
        name
        for name, parameter in list(inspect.signature(kind.forward).parameters.items())[1:]
        if name not in known and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if strange:
        raise ValueError(
            f"vLLM-Flow does not know which rows {', '.join(strange)} of {kind.__name__} are about; "
            f"{INSTEAD}."
        )
