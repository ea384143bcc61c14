"""Validation of a request in the front end, before the engine sees it.

Called by the patch ``patches/input_processor.py``. Offline the ValueError reaches the caller; the
OpenAI-compatible server answers it with HTTP 400.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_flow.engine.requests import token_layout
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import CLIFF_KEY, PolicyError, parse_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def check_params(vllm_config: VllmConfig, params: Any) -> int | None:
    """Check a request's keys before its prompt is processed.

    Returns:
        The model's number of layers if the request carries a policy, else None.

    Raises:
        PolicyError: see :func:`vllm_flow.policy.parse_policy`.
    """
    keys = getattr(params, "extra_args", None)
    if not keys:
        return None
    settings = FlowSettings.of(vllm_config)
    if settings is None or parse_policy(keys, settings.num_layers) is None:
        return None
    return settings.num_layers


def check_request(request: EngineCoreRequest, num_layers: int) -> None:
    """Check what only the processed prompt shows.

    Raises:
        PolicyError: the policy cannot be combined with this prompt or these parameters.
    """
    params = request.sampling_params
    layout = token_layout(params, request.mm_features or (), num_layers)
    if layout is None:
        return
    if request.prompt_token_ids is None:
        raise PolicyError(
            CLIFF_KEY, layout.cliff, "prompts given as embeddings have no placeholders to evict."
        )
    if layout.spans.end >= len(request.prompt_token_ids):
        raise PolicyError(
            CLIFF_KEY,
            layout.cliff,
            "the prompt ends with an image token, and the first answer token would be read from "
            "an evicted row; put text (or the chat template's turn end) after the image.",
        )
    if params.prompt_logprobs is not None:
        raise PolicyError(
            CLIFF_KEY,
            layout.cliff,
            "evicted positions have no logits, so prompt_logprobs cannot be given; leave out "
            "prompt_logprobs, or the policy.",
        )
    if request.resumable:
        raise PolicyError(
            CLIFF_KEY, layout.cliff, "streaming input may bring images later; leave out the policy."
        )
