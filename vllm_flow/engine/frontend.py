"""Validation of a request in the front end, before the engine sees it.

Called by the patch ``patches/input_processor.py``. Offline the ValueError reaches the caller; the
OpenAI-compatible server answers it with HTTP 400.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_flow.engine.prefix import SALT_MARK, policy_salt
from vllm_flow.engine.requests import token_layout, unreached_modality
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.layout import TokenLayout
from vllm_flow.log_keys import LOG_KEY, parse_log
from vllm_flow.policy_keys import CLIFF_KEY, TASK_KEY, admit, parse_policy, parse_task, request_keys
from vllm_flow.policy_values import PolicyError

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest


class RefusedRequest(VLLMValidationError, ValueError):
    """What a client sees of a refusal: ValueError offline, HTTP 400 served."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refusals into what vLLM reports to clients."""
    try:
        yield
    except PolicyError as error:
        raise RefusedRequest(str(error), parameter=error.key) from None


def check_params(params: Any, settings: FlowSettings) -> None:
    """Check a request's keys, which costs nothing, before its prompt is looked at.

    Raises:
        PolicyError: see :func:`check_keys`.
    """
    check_keys(getattr(params, "extra_args", None), settings)


def check_keys(keys: Mapping[str, Any] | None, settings: FlowSettings) -> None:
    """Check a request's keys against the model and the operator's settings.

    Raises:
        PolicyError: see :func:`vllm_flow.policy.admit`, :func:`vllm_flow.policy.parse_task` and
            :func:`vllm_flow.policy.parse_log`.
    """
    admit(
        keys,
        settings.num_layers,
        allowed=settings.allow_request_policy,
        strongest=settings.max_policy,
    )
    # Naming a task asks for a policy of the operator's, not for one of the client's own.
    parse_task(keys, None if settings.profile is None else settings.profile.policies)
    # The operator allows logging by giving a directory; it evicts nothing, so no bound applies.
    parse_log(keys, settings.num_layers, available=settings.attention_log is not None)


def check_request(request: EngineCoreRequest, settings: FlowSettings) -> None:
    """Settle a processed request's policy, and give the policy a prefix cache of its own.

    A default policy, a task's included, is what the operator prefers, not what the client asked for:
    it stays away from requests that it does not fit. What goes on to the scheduler and the workers
    says ``flow_cliff`` and nothing of tasks.

    Raises:
        PolicyError: the client's policy cannot be combined with its prompt or parameters, or its
            cache salt reads like a policy's.
    """
    salt = request.cache_salt
    if salt is not None and salt.startswith(SALT_MARK):
        raise PolicyError(
            "cache_salt",
            salt,
            f"salts that begin with {SALT_MARK!r} are vLLM-Flow's own, which keep a policy's "
            "blocks from others; send another.",
        )
    params = request.sampling_params
    if params is None:
        return
    if params.skip_clone:  # the caller's own object, which serves further requests
        params = request.sampling_params = copy.copy(params)
    own_keys = dict(params.extra_args or {})
    task = own_keys.pop(TASK_KEY, None)
    if request.resumable and parse_log(own_keys, settings.num_layers) is not None:
        raise PolicyError(
            LOG_KEY,
            own_keys[LOG_KEY],
            "streaming input has no fixed prompt to tell from the answer; leave the key out.",
        )
    default = settings.default_policy if CLIFF_KEY not in own_keys else None
    if task is not None and settings.profile is not None:
        default = settings.profile.of_task(task)
    params.extra_args = own_keys or None
    if default is not None:
        params.extra_args = {**own_keys, **request_keys(default)}
    layout = token_layout(params, request.mm_features or (), settings.num_layers)
    policy = parse_policy(params.extra_args, settings.num_layers)
    obstacle = None if policy is None else _obstacle(request, layout)
    if obstacle is not None and default is None:
        raise PolicyError(CLIFF_KEY, policy.cliff, obstacle)
    if layout is None or obstacle is not None:
        # Nothing behind the front end is told of a policy that evicts nothing.
        own_keys.pop(CLIFF_KEY, None)
        params.extra_args = own_keys or None
    else:
        request.cache_salt = policy_salt(salt, layout)


def _obstacle(request: EngineCoreRequest, layout: TokenLayout | None) -> str | None:
    """Why this request cannot evict, with the remedy; None if it can, or has nothing to evict."""
    strange = unreached_modality(request.mm_features or ())
    if strange is not None:
        return f"no policy reaches inputs of the modality {strange!r}; leave out the policy."
    if layout is None:
        return None
    if request.prompt_token_ids is None:
        return "prompts given as embeddings have no placeholders to evict."
    if layout.spans.end >= len(request.prompt_token_ids):
        return (
            "the prompt ends with an image token, and the first answer token would be read from "
            "an evicted row; put text (or the chat template's turn end) after the image."
        )
    if request.sampling_params.prompt_logprobs is not None:
        return (
            "evicted positions have no logits, so prompt_logprobs cannot be given; leave out "
            "prompt_logprobs, or the policy."
        )
    if request.resumable:
        return "streaming input may bring images later; leave out the policy."
    return None
