"""Model classes that vLLM lacks, registered with its model registry by the plugin.

Seam: ``ModelRegistry.register_model`` with a name, so that a class is imported only where its model is
served; ``AutoConfig.register`` and ``AutoTokenizer.register`` of transformers for a checkpoint whose
configuration and tokenizer are code beside it. They serve without eviction too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_flow.model_names import UnreadModel, absence
from vllm_flow.remote_code import refusal

if TYPE_CHECKING:
    from torch import nn

MODELS = {
    "InstructBlipForConditionalGeneration": (
        "vllm_flow.models.instructblip:InstructBlipForConditionalGeneration"
    ),
    "ShikraForConditionalGeneration": "vllm_flow.models.shikra:ShikraForConditionalGeneration",
    "QWenLMHeadModel": "vllm_flow.models.qwen_vl:QwenVLForConditionalGeneration",
    # As vLLM called it, with --hf-overrides, until it served it no more.
    "QwenVLForConditionalGeneration": "vllm_flow.models.qwen_vl:QwenVLForConditionalGeneration",
}
"""Architecture -> where its class is."""


def register() -> None:
    """Make vLLM know them. May run more than once; a class of vLLM's own is left in its place."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture, where in MODELS.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, where)
    register_with_transformers()


def register_with_transformers() -> None:
    """Make transformers read Qwen-VL's configuration and tokenizer with our classes, not with code of the hub.

    May run more than once; a class of transformers' own is left in its place.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig

    from vllm_flow.models.qwen_vl_config import QwenVLConfig
    from vllm_flow.models.qwen_vl_tokenizer import QWenTokenizer

    if QwenVLConfig.model_type in CONFIG_MAPPING:
        return
    AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig)

    class ByName(PreTrainedConfig):
        """No model's: a tokenizer that transformers knows by name alone comes before the hub's code."""

        model_type = "qwen_vl_tokenizer"

    AutoTokenizer.register(ByName, QWenTokenizer)


def read_config(model: str, trust_remote_code: bool) -> Any:
    """A model's ``config.json`` as vLLM reads it: some families' with classes of vLLM's own, which need no code
    of the model, and the language model's part where vLLM looks for it.

    Raises:
        Exception: whatever transformers raises for a foreign file.
    """
    from vllm.transformers_utils.config import get_config_parser

    register_with_transformers()
    return get_config_parser("hf").parse(model, trust_remote_code)[1]


def check_code(model: str, trust_remote_code: bool) -> None:
    """Refuse a model that is not there, or whose configuration is code that may not run.

    For what builds a whole configuration of vLLM, which would try three times, and log that.

    Raises:
        UnreadModel: (a ValueError) there is no such model.
        ValueError: names the option.
    """
    try:
        read_config(model, trust_remote_code)
    except Exception as error:  # whatever else is wrong, vLLM says
        if needed := refusal(error):
            raise ValueError(needed) from None
        if absent := absence(model, error):
            raise UnreadModel(f"{absent}.") from None


def replace_tower_part(model: nn.Module, name: str, make: Callable[[], nn.Module]) -> None:
    """Put another module in the place of a tower's, which stays marked as one.

    Where vLLM left the tower out, since no pictures are to come, there is nothing to replace.
    """
    from vllm.model_executor.models.utils import StageMissingLayer

    if not isinstance(getattr(model, name), StageMissingLayer):
        setattr(model, name, make())
