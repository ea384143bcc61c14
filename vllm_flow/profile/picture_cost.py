"""Works out what a picture of some size becomes for one model, and what each cliff would save of it.

Tokens come from vLLM's processor of the model, on a black picture; costs from shapes alone
(``vllm_flow/profile/ideal.py``). Loads no weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.engine import states
from vllm_flow.models import check_code
from vllm_flow.profile.dimensions import ModelShape, Workload
from vllm_flow.profile.ideal import kv_bytes, prefill_flops
from vllm_flow.remote_code import named

_CHUNK = "vision_chunk"
"""What Kimi-K2.5 calls a picture."""
TEXT_TOKENS = 64
"""Text beside the picture, where costs are compared."""


@dataclass(frozen=True)
class PictureTokens:
    """A picture in the prompt."""

    evicted: int
    """Embeddings of the picture, which leave at the cliff."""
    kept: int
    """Markers within its placeholder, which are text."""


def read_config(model: str, **arguments: Any) -> Any:
    """vLLM's ``ModelConfig`` of a folder or a name of the hub, as its server builds it; no weights are loaded.

    Args:
        arguments: further ones of vLLM's ``EngineArgs``.

    Raises:
        ValueError: vLLM, or the extension, refuses it; names the reason.
        OSError: there is no such model.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flow.engine import families, plugin
    from vllm_flow.engine.setting_values import CONFIG_KEY

    plugin.register()
    check_code(model, bool(arguments.get("trust_remote_code")))
    flow = {CONFIG_KEY: {families.UNTESTED: True}}
    # Asked about the model, not about options: some models are refused with this one, which is vLLM's default.
    arguments = {"enable_prefix_caching": False} | arguments
    try:
        made = EngineArgs(model=model, additional_config=flow, **arguments)
        return made.create_engine_config().model_config
    except (ValueError, OSError):
        raise
    # Of foreign files, which may lack anything or hold it in any type.
    except Exception as error:
        raise ValueError(f"its configuration cannot be read ({error!r})") from error


def picture_tokens(model_config: Any, width: int, height: int) -> PictureTokens:
    """Tokens of one picture, by the processor that a request would go through.

    Args:
        model_config: vLLM's finished ``ModelConfig``.

    Raises:
        ValueError: the processor is code of the model, which may not run.
    """
    from PIL import Image
    from vllm.multimodal import MULTIMODAL_REGISTRY

    picture: dict[str, Any] = {"image": [Image.new("RGB", (width, height))]}
    with named():
        processor = MULTIMODAL_REGISTRY.create_processor(model_config)
        if _CHUNK in processor.info.get_supported_mm_limits():
            picture = {_CHUNK: [{"type": "image", "image": picture["image"][0], "uuid": None}]}
        places = _placeholders(processor, model_config, picture)
    evicted = sum(
        end + 1 - start for place in places for start, end in place.extract_embeds_range()
    )
    return PictureTokens(evicted, sum(place.length for place in places) - evicted)


def _placeholders(processor: Any, model_config: Any, picture: dict[str, Any]) -> Any:
    from vllm.multimodal.processing.context import TimingContext

    (kind,) = picture
    if "mm_data" in inspect.signature(processor.get_dummy_inputs).parameters:
        # Mistral's tokenizer writes a picture's tokens into the prompt itself.
        asked = processor.get_dummy_inputs(
            model_config.max_model_len, {kind: 1}, {}, mm_data=picture
        )
        found = processor.apply(asked, TimingContext(enabled=False))
    else:
        items = processor.info.parse_mm_data(picture)
        found = processor(processor.dummy_inputs.get_dummy_text({kind: 1}), items)
    return found["mm_placeholders"][kind]


def uncounted(model_config: Any) -> str | None:
    """Why a language model's costs are not counted here, to go on after its name; None where they are."""
    text = model_config.hf_text_config
    if states.attending(model_config):
        return "has layers that keep states, whose costs are not counted"
    if _has_windows(text):
        return "has sliding windows, whose costs are not counted"
    if model_config.is_moe or not isinstance(getattr(text, "intermediate_size", None), int):
        return "is a mixture of experts, whose FLOPs are not counted; profile a dense model of its family"
    if getattr(text, "kv_lora_rank", None) is not None:
        return "has latent attention, whose FLOPs are not counted"
    return None


def decoder_shape(model_config: Any) -> ModelShape | None:
    """The language model's shape; None where its costs are :func:`uncounted`."""
    if uncounted(model_config) is not None:
        return None
    text = model_config.hf_text_config
    return ModelShape(
        layers=model_config.get_total_num_hidden_layers(),
        hidden=model_config.get_hidden_size(),
        heads=text.num_attention_heads,
        kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=model_config.get_head_size(),
        mlp=text.intermediate_size,
        vocab=model_config.get_vocab_size(),
        value_bytes=model_config.dtype.itemsize,
    )


def _has_windows(text: Any) -> bool:
    types = getattr(text, "layer_types", None)
    if types:
        return "sliding_attention" in types
    return bool(getattr(text, "sliding_window", None))


def savings(
    shape: ModelShape, image_tokens: int, group_starts: Sequence[int]
) -> Iterator[tuple[int, float, float]]:
    """Per cliff at which a storage group begins: it, and the shares saved of FLOPs and KV bytes.

    A group that a cliff lies within stores all tokens, so in between as much memory is saved as at the next one.

    Args:
        group_starts: first layer of each storage group.
    """
    work = Workload(text_tokens=TEXT_TOKENS, image_tokens=image_tokens, output_tokens=1)
    flops = prefill_flops(shape, work, shape.layers).total
    stored = kv_bytes(shape, work, shape.layers)
    for cliff in group_starts:
        yield (
            cliff,
            1 - prefill_flops(shape, work, cliff).total / flops,
            1 - kv_bytes(shape, work, cliff) / stored,
        )
