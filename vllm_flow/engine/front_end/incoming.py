"""Checks and settles a request in the front end, before the engine sees it.

Called by the patch ``patches/input_processor.py``. Offline the ValueError reaches the caller; the
OpenAI-compatible server answers it with HTTP 400.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_flow.engine import scored_pictures
from vllm_flow.engine.core.connectors import LAYOUT_KEY
from vllm_flow.engine.core.prefix import SALT_MARK, policy_salt
from vllm_flow.engine.front_end import default_policies, refused_streams
from vllm_flow.engine.front_end.fitting import check_bounds, fitted, transfer_of
from vllm_flow.engine.front_end.settled import Settled, note
from vllm_flow.engine.obstacles import Misfit, Obstacle
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.log_keys import LOG_KEY, parse_log
from vllm_flow.policy_bounds import admit, parse_task
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import (
    FORMS,
    POLICY_KEYS,
    TASK_KEY,
    is_own,
    parse_policy,
    request_keys,
)

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from vllm_flow.layout import TokenLayout
    from vllm_flow.policy import FlowPolicy


logger = init_logger("vllm.vllm_flow.frontend")


class RefusedRequest(VLLMValidationError, ValueError):
    """What a client sees of a refusal: ValueError offline, HTTP 400 served."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refusals into what vLLM reports to clients."""
    try:
        yield
    except PolicyError as error:
        refused_streams.note(str(error), error.key)
        # Under no name here: with its traceback it would keep what the request holds until garbage is collected.
        raise RefusedRequest(str(error), parameter=error.key) from None


def tell_unread(params: Any) -> None:
    """Say, once, that a request's keys go unread in an engine without the extension.

    Refusing them here would come after its picture was prepared, which vLLM's next request with it relies on.
    """
    keys = getattr(params, "extra_args", None) or {}
    unread = sorted(key for key in keys if is_own(key))
    if unread:
        logger.warning_once(
            "A request sends %s, which vLLM-Flow is not there to read: the answer is that of no policy. "
            "Start this engine with --additional-config '{\"vllm_flow\": {}}'.",
            ", ".join(unread),
        )


def check_keys(keys: Mapping[str, Any] | None, settings: FlowSettings) -> None:
    """Check a request's keys against the model and the operator's settings, before its prompt is looked at.

    Raises:
        PolicyError: see :func:`vllm_flow.policy_bounds.admit`, :func:`vllm_flow.policy_bounds.parse_task`
            and :func:`vllm_flow.log_keys.parse_log`.
    """
    admit(
        keys,
        settings.num_layers,
        allowed=settings.allow_request_policy,
        bound=settings.max_policy,
    )
    # Naming a task asks for a policy of the operator's, not for one of the client's own.
    parse_task(keys, None if settings.profile is None else settings.profile.policies)
    # The operator allows logging by giving a directory; it evicts nothing, so no bound applies.
    parse_log(
        keys,
        settings.num_layers,
        available=settings.attention_log is not None,
        attending=settings.engine.attending,
    )


def settle(request: EngineCoreRequest, settings: FlowSettings) -> None:
    """Settle a processed request's policy, and give the policy a prefix cache of its own.

    What goes on to the scheduler and the workers says stages, and nothing of tasks and presets. Nothing behind
    the front end is told of a policy that evicts nothing.

    Raises:
        PolicyError: the client's policy cannot be combined with its prompt or parameters, or its
            cache salt reads like a policy's.
    """
    _check_salt(request.cache_salt)
    params = request.sampling_params
    if params is None:
        return
    if params.skip_clone:  # the caller's own object, which serves further requests
        params = request.sampling_params = copy.copy(params)
    keys = dict(params.extra_args or {})
    log = parse_log(keys, settings.num_layers, attending=settings.engine.attending)
    if log is not None:
        _check_loggable(request, keys[LOG_KEY])
    chosen = _chosen(request, keys, settings)
    layout, skipped = _layout(request, chosen, settings, keys)
    if layout is None and settings.engine.connected:
        _check_handed(transfer_of(keys))
    others = {key: value for key, value in keys.items() if key not in (*POLICY_KEYS, TASK_KEY)}
    if log is not None and settings.engine.attending:
        others |= log.request_keys()  # which layers attend is known here alone
    params.extra_args = others or None
    if layout is not None and chosen.policy is not None:
        _apply(request, params, layout, chosen.policy)
    note(params, Settled(chosen.task, skipped))


@dataclass(frozen=True)
class Chosen:
    """The policy that a request is to have if it fits, and who chose it."""

    policy: FlowPolicy | None
    asked: str | None
    """The client's key that asks for it; None where it is the operator's: a task's, a model's or the default."""
    task: str
    """That the client named; empty if none."""
    named: str = ""
    """What the operator's is called."""


def _chosen(request: EngineCoreRequest, keys: Mapping[str, Any], settings: FlowSettings) -> Chosen:
    """The policy by a request's checked keys: its own, else the operator's for it."""
    policy = parse_policy(keys, settings.num_layers)
    asked, task = next((key for key in FORMS if key in keys), None), keys.get(TASK_KEY)
    if asked is not None:
        return Chosen(policy, asked, task or "")
    policy, named = default_policies.of_request(request, task, settings)
    return Chosen(policy, None, task or "", named)


def _layout(
    request: EngineCoreRequest, chosen: Chosen, settings: FlowSettings, keys: Mapping[str, Any]
) -> tuple[TokenLayout | None, Misfit | None]:
    """The request's layout under the chosen policy, or why an operator's stays away from it.

    A default policy, a task's or a model's included, is what the operator prefers, not what the client asked for:
    it stays away from requests that it does not fit, and the operator is told (`default_policies`).

    Returns:
        The layout, None where nothing is evicted; and the reason, None where nothing was in the way.

    Raises:
        PolicyError: the client's own policy does not fit, or evicts more than the operator allows.
    """
    policy, asked = chosen.policy, chosen.asked
    if policy is None:
        return None, None
    try:
        return _within_bounds(request, policy, settings, keys, asked is not None), None
    except Obstacle as obstacle:
        if asked is not None:
            key = obstacle.key or asked
            raise PolicyError(key, keys.get(key, keys[asked]), str(obstacle)) from None
        default_policies.tell_skipped(policy, chosen.named, obstacle.kind, str(obstacle))
        return None, obstacle.kind


def _within_bounds(
    request: EngineCoreRequest,
    policy: FlowPolicy,
    settings: FlowSettings,
    keys: Mapping[str, Any],
    own: bool,
) -> TokenLayout | None:
    """The request's layout under a policy, within the operator's bounds; None where nothing would be evicted.

    Args:
        own: whether the client asked for the policy.

    Raises:
        Obstacle: the policy does not fit.
        PolicyError: the client's own evicts more than the operator allows.
    """
    layout = fitted(request, policy, settings, keys)
    if settings.max_policy is None:
        return layout
    try:
        check_bounds(request, policy, settings.max_policy, settings.num_layers, keys)
    except PolicyError as error:
        if own:
            raise
        # Within its bounds for pictures of other sizes.
        raise Obstacle(Misfit.BOUND, str(error)) from None
    return layout


def _apply(
    request: EngineCoreRequest, params: SamplingParams, layout: TokenLayout, policy: FlowPolicy
) -> None:
    """Have a request evict: the policy's stages as keys, its pictures' names, and its prefix-cache salt."""
    params.extra_args = {**(params.extra_args or {}), **request_keys(policy)}
    if request.mm_features:
        request.mm_features = scored_pictures.named(request.mm_features, layout)
    if not layout.late:  # till its images leave, such a request is one without a policy
        request.cache_salt = policy_salt(request.cache_salt, layout)


def _check_salt(salt: str | None) -> None:
    if salt is not None and salt.startswith(SALT_MARK):
        raise PolicyError(
            "cache_salt",
            salt,
            f"salts that begin with {SALT_MARK!r} are vLLM-Flow's own, which keep a policy's "
            "blocks from others; send another.",
        )


def _check_loggable(request: EngineCoreRequest, wanted: Any) -> None:
    """Whether a request whose attention is to be logged has a prompt of text and pictures."""
    if request.resumable:
        reason = "streaming input has no fixed prompt to tell from the answer; leave the key out."
    elif request.prompt_embeds is not None:
        reason = (
            "a prompt given as embeddings does not say what is text and what a picture; leave the key "
            "out."
        )
    else:
        return
    raise PolicyError(LOG_KEY, wanted, reason)


def _check_handed(asked: Mapping[str, Any]) -> None:
    """Whether a prompt that another engine computed was computed without a policy, too."""
    if LAYOUT_KEY in asked:
        raise PolicyError(
            LAYOUT_KEY,
            asked[LAYOUT_KEY],
            "the prompt was prefilled under a policy; send that policy with it.",
        )
