"""Validation of a request in the front end, before the engine sees it.

Called by the patch ``patches/input_processor.py``. Offline the ValueError reaches the caller; the
OpenAI-compatible server answers it with HTTP 400.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMClientError, VLLMValidationError

from vllm_flow.engine.prefix import SALT_MARK, policy_salt
from vllm_flow.engine.requests import token_layout
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import CLIFF_KEY, PolicyError, parse_policy

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest


class RefusedRequest(VLLMValidationError, ValueError):
    """What a client sees of a refusal: ValueError offline, HTTP 400 served."""


@contextmanager
def refusals(renderer: Any, prompt: Any) -> Iterator[None]:
    """Turn refusals into what vLLM reports to clients, and let refused pictures be sent again.

    vLLM processes pictures before it validates the request, and from then on takes them for known
    to the engine. Unless it is told to forget them, the next good request with the same picture
    would go out without it and fail.
    """
    try:
        yield
    except PolicyError as error:
        _forget_pictures(renderer, prompt)
        raise RefusedRequest(str(error), parameter=error.key) from None
    except (ValueError, VLLMClientError):
        _forget_pictures(renderer, prompt)
        raise


def _forget_pictures(renderer: Any, prompt: Any) -> None:
    cache = renderer.mm_processor_cache
    if cache is None or not isinstance(prompt, dict):
        return
    for hashes in prompt.get("mm_hashes", {}).values():
        for picture in hashes:
            cache.invalidate(picture)


def check_params(params: Any, settings: FlowSettings) -> None:
    """Check a request's keys, which costs nothing, before its prompt is looked at.

    Raises:
        PolicyError: see :func:`vllm_flow.policy.parse_policy`.
    """
    parse_policy(getattr(params, "extra_args", None), settings.num_layers)


def check_request(request: EngineCoreRequest, settings: FlowSettings) -> None:
    """Check what only the processed prompt shows, and give the policy a prefix cache of its own.

    Raises:
        PolicyError: the policy cannot be combined with this prompt or these parameters, or the
            client's cache salt reads like a policy's.
    """
    if request.cache_salt is not None and request.cache_salt.startswith(SALT_MARK):
        raise PolicyError(
            "cache_salt",
            request.cache_salt,
            f"salts that begin with {SALT_MARK!r} are vLLM-Flow's own, which keep a policy's "
            "blocks from others; send another.",
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
