"""What the driver must know of a model before any engine runs, read from its configuration.

Knows Hugging Face configurations and processors; loads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_flow.demo_model.naming import DEMO_MODELS, resolve_model
from vllm_flow.eval.sweep.conversation import Conversation, choose
from vllm_flow.eval.sweep.policy import Policy
from vllm_flow.model_names import UnreadModel, why_unread
from vllm_flow.ranks import RANKS, FrameRank, TowerScore
from vllm_flow.remote_code import refusal
from vllm_flow.user_text import shown

CHUNKED = ("kimi_k25",)
"""Types of models whose pictures are vLLM's modality "vision_chunk"."""
WITHOUT_CLASS = frozenset(
    f"{name}ForConditionalGeneration"
    for name in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")
)
"""Models whose towers have no class token."""
LLAVAS = frozenset(
    f"{name}ForConditionalGeneration" for name in ("Llava", "LlavaNext", "LlavaOnevision")
)
"""Models of which the tower's type says whether it has one."""
ATTENDING = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""What a configuration calls layers that store keys and values."""
MOST_LAYERS = 10_000
"""More than any model has."""


class ModelError(ValueError):
    """The model cannot be used as asked; the message names the remedy."""


@dataclass(frozen=True)
class ModelFacts:
    """The model as policies, records and prompts need it."""

    num_layers: int
    dtype: str
    """What the checkpoint is in: `float16`, `bfloat16` or `float32`."""
    full_grid: int | None
    """Side of the vision tower's square of patches; None where it is no such square."""
    no_downsampling: str | None
    """Why pictures cannot be reduced for this model; None if they can."""
    conversation: Conversation
    no_class_token: str | None = None
    """Why no rank can read what a class token attends to, where the configuration says so; else the engine does."""
    architecture: str = ""
    """The model's class, as its configuration names it."""
    all_attend: bool = True
    """Whether every decoder layer is known to store keys and values."""


def read_facts(
    model: str, conversation: str = "auto", trust_remote_code: bool = False
) -> ModelFacts:
    """Facts of a model given by name or path.

    Args:
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: nothing can be read there, or only by code that may not run.
        ConversationError: no prompt can be made for it.
    """
    config, processor = _read(model, trust_remote_code)
    if config.model_type in CHUNKED:
        raise ModelError(
            f"model {model!r}: its pictures are of a modality of their own, which chats with a server carry and "
            "prompts do not: evaluate it by a harness that asks the server (docs/harness.md)."
        )
    text = config.get_text_config()
    return ModelFacts(
        num_layers=_num_layers(model, text),
        dtype=str(config.dtype or text.dtype or "float32").removeprefix("torch."),
        full_grid=full_grid(config),
        no_downsampling=downsampling_obstacle(config),
        conversation=choose(conversation, model, processor, lambda: picture_mark(config)),
        no_class_token=class_token_obstacle(config),
        architecture=next(iter(config.architectures or ()), ""),
        all_attend=set(getattr(text, "layer_types", None) or ()) <= ATTENDING,
    )


def read_shape(model: str, trust_remote_code: bool = False) -> tuple[int, int | None]:
    """Decoder layers of a model, and the side of the square of image tokens that a picture becomes, if it does.

    Raises:
        ModelError: see :func:`read_facts`.
    """
    config, _ = _read(model, trust_remote_code)
    grid = None if downsampling_obstacle(config) else full_grid(config)
    return _num_layers(model, config.get_text_config()), grid


def _read(model: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model's configuration and processor."""
    from vllm_flow.engine.process import hush
    from vllm_flow.models import read_config

    if model in DEMO_MODELS:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hush()
    try:
        path = resolve_model(model)
    except UnreadModel as error:
        raise ModelError(str(error)) from None
    try:
        return read_config(path, trust_remote_code), read_processor(path, trust_remote_code)
    # Transformers reads foreign files and raises what it likes for damaged ones (KeyError, TypeError, ...).
    except Exception as error:
        if needed := refusal(error):
            raise ModelError(f"model {model!r}: {needed}") from None
        raise ModelError(
            f"model {model!r} cannot be read: {why_unread(path, error)} (a directory, a hub name, or `demo`; "
            "HF_HUB_OFFLINE=1 keeps to what is in the hub's cache)"
        ) from None


def _num_layers(model: str, text: Any) -> int:
    found = getattr(text, "num_hidden_layers", None)
    if not isinstance(found, int) or not 0 < found < MOST_LAYERS:
        raise ModelError(
            f"model {model!r}: num_hidden_layers is {shown(found)} in its configuration"
        )
    return found


def read_processor(path: str, trust_remote_code: bool) -> Any:
    """The model's processor, or its tokenizer where it has no more."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)


def picture_mark(config: Any) -> str | None:
    """What vLLM's server writes for a picture into a text; None where the model's processor adds it by itself.

    Raises:
        ModelError: vLLM has no such model, or none that takes pictures.
    """
    from vllm import ModelRegistry

    from vllm_flow.models import register

    register()
    found = [
        ModelRegistry.models[name]
        for name in config.architectures or ()
        if name in ModelRegistry.models
    ]
    mark = getattr(found[0].load_model_cls(), "get_placeholder_str", None) if found else None
    if mark is None:
        raise ModelError(
            f"vLLM has no model that takes pictures for {', '.join(config.architectures or ('?',))}"
        )
    return mark("image", 1)


def full_grid(config: Any) -> int | None:
    """Side of the square of image tokens, None where the tower gives no such square."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int) or size % patch:
        return None
    return size // patch


def class_token_obstacle(config: Any) -> str | None:
    """Why a model's vision tower has no class token beside its image tokens, where that is known for sure."""
    architectures = config.architectures or ()
    if WITHOUT_CLASS & set(architectures):
        return f"the vision tower of {architectures[0]} has none"
    if not LLAVAS & set(architectures):
        return None
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        return f"its vision tower ({tower}) has none"
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    if strategy != "default":
        return f"with vision_feature_select_strategy={strategy!r} it is one of the image's tokens itself"
    return None


def check_ranks(policies: Iterable[Policy], facts: ModelFacts, model: str) -> None:
    """Refuse ranks that no engine with this model could have, or not of pictures.

    Raises:
        ModelError: names the first policy with one.
    """
    for policy in policies:
        flow = policy.flow()
        for name in sorted(flow.ranks) if flow is not None else ():
            rank = RANKS[name]
            if isinstance(rank, FrameRank):
                raise ModelError(
                    f"policy {policy.name!r}: rank {name!r} goes by the frames of a video, and questions are asked "
                    "about pictures; leave it out."
                )
            classed = getattr(rank, "score", None) is TowerScore.CLASS
            if classed and facts.no_class_token is not None:
                raise ModelError(
                    f"policy {policy.name!r}: rank {name!r} reads what the class token attends to, and {model} has no "
                    f"such token beside the image's, since {facts.no_class_token}; leave it out."
                )


def downsampling_obstacle(config: Any) -> str | None:
    """Why a picture of fewer patches cannot go through this model's vision tower, None if it can.

    The tower must put its patches on one square grid with learned positions, which can be
    interpolated, and each patch must become one image token.
    """
    architectures = config.architectures or ()
    if "LlavaForConditionalGeneration" not in architectures:
        return f"the image tokens of {', '.join(architectures)} are no square of patches"
    tower = config.vision_config.model_type
    # CLIP's first token is the class token, which only "default" leaves out; SigLIP has none.
    wanted = {"clip_vision_model": "default", "siglip_vision_model": "full"}
    if tower not in wanted:
        return f"its vision tower ({tower}) has no learned positions to interpolate"
    if config.vision_feature_select_strategy != wanted[tower]:
        return (
            f"with vision_feature_select_strategy={config.vision_feature_select_strategy!r} its "
            f"{tower} does not give one image token for each patch"
        )
    if full_grid(config) is None:
        return "its patches do not fill its picture"
    return None
