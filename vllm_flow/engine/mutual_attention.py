"""Pictures whose tokens attend to one another in both directions (Gemma 3): which ranges, on which backends.

vLLM's layers see them by ranges of positions in a request's storage. In layers before the first stage these are
vLLM's own; past it, where storage is packed, those of :mod:`vllm_flow.mutual`.

Seams: ``ModelConfig.is_mm_prefix_lm``; ``compute_mm_prefix_ranges`` of ``vllm/v1/worker/gpu/attn_utils.py``, which
:func:`ranges_of` follows; ``CommonAttentionMetadata.mm_req_doc_ranges``; ``supports_mm_prefix`` of a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm_flow.engine import backends

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    # Brings numpy, without which `vllm-flow doctor` reads the support matrix.
    from vllm_flow.spans import Range

BACKENDS = ("TRITON_ATTN", "TRITON_FLASH_ATTN", "TRITON_FLASHINFER")
"""Backends that take ranges, and of which the metadata of a step's layers share no memory, the last one's since each
variant has a builder of its own (`variant_builders`).

FlashAttention 4 and FlexAttention take ranges too, but write them, or lengths, into one buffer per builder: what
they built for the layers past a cliff would overwrite what the layers before it read.
"""

WHICH = "pictures whose tokens attend to one another in both directions (Gemma 3 and others)"
_WITHOUT = "or leave out additional_config['vllm_flow']."

RangesOf: TypeAlias = "Callable[[Iterable[MultiModalFeatureSpec]], tuple[Range, ...]]"


CLAMPED = ("gemma4_text",)
"""Language models whose kernels keep a range within a sliding window, query by query. Model Runner V1 leaves such
ranges whole where they are wider than the window; V2 makes them causal, as it does any model's."""


def reader(vllm_config: Any) -> RangesOf | None:
    """What reads the mutual ranges of a request off its inputs; None where a model has none."""
    model_config = vllm_config.model_config
    if not model_config.is_mm_prefix_lm:
        return None
    whole = model_config.hf_text_config.model_type in CLAMPED
    if whole and not vllm_config.use_v2_model_runner:
        return partial(ranges_of, longest=None)
    return partial(ranges_of, longest=model_config.get_sliding_window())


def ranges_of(features: Iterable[MultiModalFeatureSpec], longest: int | None) -> tuple[Range, ...]:
    """Ranges of a prompt whose tokens see one another, ascending.

    Args:
        longest: ranges of more tokens than a sliding window has are causal in vLLM, in every layer. None: none is.
    """
    found = [
        (start, last + 1)
        for feature in features
        if feature.modality in ("image", "video")
        for start, last in feature.mm_position.extract_embeds_range()
        if longest is None or last - start < longest
    ]
    return tuple(sorted(found))


def as_vllm(mutual: Mapping[int, Sequence[Range]]) -> dict[int, list[Range]] | None:
    """Ranges of a variant as ``mm_req_doc_ranges``, whose ranges end with their last position."""
    if not mutual:
        return None
    return {index: [(a, b - 1) for a, b in ranges] for index, ranges in mutual.items()}


def reason_against(vllm_config: Any) -> str | None:
    """Why a model with such pictures cannot be served as configured, None if it can or has none.

    Which backend a layer gets on a GPU is known when the model is loaded: :func:`check_backends`.
    """
    if not vllm_config.model_config.is_mm_prefix_lm:
        return None
    scheduler = vllm_config.scheduler_config
    if _causal_platform(vllm_config):
        return f"{WHICH} on a CPU, where vLLM's attention is causal: serve it on a CUDA device, {_WITHOUT}"
    if not scheduler.disable_chunked_mm_input:
        return f"{WHICH} in parts: set disable_chunked_mm_input, {_WITHOUT}"
    if scheduler.long_prefill_token_threshold > 0:
        return f"{WHICH} in parts: leave out long_prefill_token_threshold, {_WITHOUT}"
    return None


def check_backends(model_config: Any, attn_groups: Iterable[Iterable[Any]]) -> None:
    """Refuse a backend that cannot do it.

    Args:
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects.

    Raises:
        ValueError: names the backend, and one that can.
    """
    if not model_config.is_mm_prefix_lm:
        return
    for backend in backends.used(attn_groups):
        if backend.get_name() not in BACKENDS:
            raise ValueError(
                f"vLLM-Flow does not support {WHICH} with the attention backend {backend.get_name()}: "
                f"start with --attention-backend {BACKENDS[0]} "
                f"(attention_config={{'backend': {BACKENDS[0]!r}}}), {_WITHOUT}"
            )


def _causal_platform(vllm_config: Any) -> bool:
    """Whether this is a CPU, whose only backend knows no ranges; vLLM takes it without a word."""
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import AttentionSelectorConfig

    if not current_platform.is_cpu():
        return False
    model = vllm_config.model_config
    path = current_platform.get_attn_backend_cls(
        vllm_config.attention_config.backend,
        AttentionSelectorConfig(model.get_head_size(), model.dtype, None, None, use_mm_prefix=True),
    )
    return not resolve_obj_by_qualname(path).supports_mm_prefix()
