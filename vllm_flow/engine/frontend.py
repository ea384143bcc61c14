"""Validation of a request in the front end, before the engine sees it.

Called by the patch ``patches/input_processor.py``. Offline the ValueError reaches the caller; the
OpenAI-compatible server answers it with HTTP 400.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_flow.engine.prefix import SALT_MARK, policy_salt
from vllm_flow.engine.requests import token_layout
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import CLIFF_KEY, PolicyError, parse_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def check_params(vllm_config: VllmConfig, params: Any) -> FlowSettings | None:
    """Check a request's keys before its prompt is processed: a bad key costs the server no work.

    Returns:
        The engine's settings, None where the extension is off.

    Raises:
        PolicyError: see :func:`vllm_flow.policy.parse_policy`.
    """
    settings = FlowSettings.of(vllm_config)
    if settings is not None:
        parse_policy(getattr(params, "extra_args", None), settings.num_layers)
    return settings


def check_request(request: EngineCoreRequest, settings: FlowSettings) -> None:
    """Check what only the processed prompt shows, and give the policy a prefix cache of its own.

    Raises:
        PolicyError: the policy cannot be combined with this prompt or these parameters.
        ValueError: the client's cache salt reads like a policy's.
    """
    if request.cache_salt is not None and request.cache_salt.startswith(SALT_MARK):
        raise ValueError(
            f"cache_salt={request.cache_salt[:40]!r}: salts that begin with {SALT_MARK!r} are "
            "vLLM-Flow's own, which keep a policy's blocks from others; send another."
        )
    params = request.sampling_params
    layout = token_layout(params, request.mm_features or (), settings.num_layers)
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
    request.cache_salt = policy_salt(request.cache_salt, layout)
