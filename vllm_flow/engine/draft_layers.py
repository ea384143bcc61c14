"""Where the layers of a drafter are stored: its keys and values beside the target's.

A drafter that is a model (EAGLE's head, layers of multi-token prediction, a small model) keeps keys and values of its
own. They are of every token, by position, whatever the target evicts. Its layers are stored as if they stood before the
target's first layer, in the first storage group. No stage begins before layer 0, so these layers always see whole
prompts, and the group's block counts include them.

Seams: the names of vLLM's attention layers, in which drafters number theirs behind the target's or under a prefix
of their own; ``_draft_attn_layer_names`` of a proposer, ``draft_attn_layer_names`` of a speculator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from vllm_flow.engine.drafts import WITH_LAYERS

OWN_NAMES = ("draft_model.", "mtp.")
"""What names of a drafter's layers may begin with that are numbered from 0."""


def drafter_layers(config: Any) -> int:
    """Decoder layers of the drafter, each with keys and values; 0 where it stores none.

    Args:
        config: vLLM's finished ``VllmConfig``.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.method not in WITH_LAYERS:
        return 0
    drafter = speculative.draft_model_config
    if speculative.method != "mtp":
        return int(drafter.get_total_num_hidden_layers())
    told = (
        getattr(config, name, None)
        for config in (drafter.hf_config, drafter.hf_text_config)
        for name in ("n_predict", "num_nextn_predict_layers")
    )
    return next((number for number in told if number), 1)


def storage_layer(name: str, number: int, num_layers: int, draft_layers: int) -> int:
    """Where a layer comes in storage: the target's by their number, a drafter's below 0.

    Args:
        name: of vLLM's attention layer.
        number: the one in its name.
        num_layers: decoder layers of the target.
        draft_layers: see :func:`drafter_layers`.
    """
    if not draft_layers:
        return number
    if name.startswith(OWN_NAMES):
        return number - draft_layers
    return number if number < num_layers else number - num_layers - draft_layers


def layer_in_group(name: str, number: int, spec: Any) -> int:
    """The same, given the storage group of the layer, of a drafter's layers the group's first.

    Args:
        spec: the group's specification.
    """
    first = getattr(spec, "first_layer", 0)
    if first >= 0:
        return number
    return first if number > spec.last_layer or name.startswith(OWN_NAMES) else number


def check_layers(
    names: Collection[str], drafters: Collection[str], layer_of: Callable[[str], int]
) -> None:
    """Refuse a drafter whose layers are not where their names and its configuration say.

    Args:
        names: of all attention layers that store keys and values.
        drafters: those of them that vLLM's proposer says are its own.
        layer_of: :func:`storage_layer` by name.

    Raises:
        ValueError: names the layers.
    """
    found = {name for name in names if layer_of(name) < 0}
    if found != set(drafters):
        raise ValueError(
            f"vLLM-Flow stores a drafter's layers before the model's, but takes {sorted(found)} for its layers, and "
            f"vLLM {sorted(drafters)}: set the method of speculative_config to 'ngram', or leave it out."
        )
