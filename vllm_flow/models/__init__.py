"""Model classes that vLLM lacks, registered with its model registry by the plugin.

Seam: ``ModelRegistry.register_model`` with a name, so that a class is imported only where its model is
served. They serve without eviction too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

MODELS = {
    "InstructBlipForConditionalGeneration": (
        "vllm_flow.models.instructblip:InstructBlipForConditionalGeneration"
    ),
    "ShikraForConditionalGeneration": "vllm_flow.models.shikra:ShikraForConditionalGeneration",
}
"""Architecture -> where its class is."""


def register() -> None:
    """Make vLLM know them. May run more than once; a class of vLLM's own is left in its place."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture, where in MODELS.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, where)


def replace_tower_part(model: nn.Module, name: str, make: Callable[[], nn.Module]) -> None:
    """Put another module in the place of a tower's, which stays marked as one.

    Where vLLM left the tower out, since no pictures are to come, there is nothing to replace.
    """
    from vllm.model_executor.models.utils import StageMissingLayer

    if not isinstance(getattr(model, name), StageMissingLayer):
        setattr(model, name, make())
