"""Bounds, for an operator, which policies requests may ask for, and reads the policies of tasks.

Knows keys, not prompts, like `policy_keys`; what is out of bounds only in view of the prompt is for the
front end to ask with :func:`check_bound`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm_flow.policy import FlowPolicy, first_layer_beyond
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import (
    CLIFF_KEY,
    FORMS,
    KEEP_KEY,
    POLICY_KEYS,
    TASK_KEY,
    WHEN_KEY,
    parse_policy,
    quoted,
    request_keys,
)

NOTHING = FlowPolicy(((),))
"""Evicts nothing."""


def operators_policy(keys: Mapping[str, Any], num_layers: int) -> FlowPolicy | None:
    """A policy that an operator writes for requests of any kind; see :func:`parse_policy`.

    Raises:
        PolicyError: also where it is meant for prompts with a certain number of images.
    """
    policy = parse_policy(keys, num_layers)
    if policy is not None and not policy.shared:
        key = next(key for key in (CLIFF_KEY, KEEP_KEY) if isinstance(keys.get(key), (list, tuple)))
        raise PolicyError(
            key, keys[key], "requests have any number of images; give one value for all of them."
        )
    return policy


def admit(
    keys: Mapping[str, Any] | None,
    num_layers: int,
    *,
    allowed: bool = True,
    bound: FlowPolicy | None = None,
) -> FlowPolicy | None:
    """What a request asks for within an operator's bounds, as far as they can be told without its prompt.

    See :func:`vllm_flow.policy_keys.parse_policy`.

    Args:
        allowed: whether requests may carry a policy at all.
        bound: the most they may evict, as a policy.

    Raises:
        PolicyError: also where the operator's bounds exclude what is asked for.
    """
    policy, given = parse_policy(keys, num_layers), keys or {}
    own = next((key for key in FORMS if key in given), None)
    if own is not None and not allowed:
        raise PolicyError(
            own, given[own], "the operator of this server sets the policy; leave it out."
        )
    if policy is None or bound is None:
        return policy
    if policy.only_withdraws and bound.only_withdraws:
        # No picture has a say in this: of any size, one has more tokens than none.
        check_bound(policy, bound, [1] * len(policy.images), num_layers, given)
    return policy


def check_bound(
    policy: FlowPolicy,
    bound: FlowPolicy,
    image_tokens: Sequence[int],
    num_layers: int,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a policy that evicts more than the operator allows.

    Args:
        image_tokens: tokens of each image, in the order of the prompt.
        given: the keys in which the policy was written, one of which is named; where it is not told, or
            none of them is a policy's (a task was named), those that say the same.

    Raises:
        PolicyError: names the layer and what may be evicted there.
    """
    keys = given if given and any(key in given for key in FORMS) else request_keys(policy)
    late = bound.when == "decode" and policy.when == "prefill"
    if late and first_layer_beyond(policy.within(num_layers), NOTHING, image_tokens) is not None:
        raise PolicyError(
            WHEN_KEY,
            policy.when,
            'the operator of this server allows eviction after the prefill; send "decode".',
        )
    layer = first_layer_beyond(policy, bound, image_tokens)
    if layer is None:
        return
    key = next(key for key in FORMS if key in keys)
    if bound.only_withdraws:
        cliff = bound.images[0][0].layer
        if key == CLIFF_KEY:
            remedy = f"it must be an integer from {cliff} to {num_layers}."
        else:
            remedy = f"this begins at layer {layer}; send stages that begin at {cliff} or deeper."
        raise PolicyError(
            key, keys[key], f"the operator of this server allows layers from {cliff} on; {remedy}"
        )
    raise PolicyError(
        key,
        keys[key],
        f"it evicts more from layer {layer} on than the operator of this server allows, which is "
        f'"{bound}".',
    )


SIZES = tuple(256 << power for power in range(8))
"""Tokens of a picture at which two policies are compared when no picture is known: shares of fewer would often
be rounded to the same number."""


def contradicts(policy: FlowPolicy, bound: FlowPolicy, num_layers: int) -> bool:
    """Whether a policy evicts more than a bound allows from every picture from which it evicts any.

    One that does so from pictures of some sizes alone, as a share may beside a number of tokens, is none: what
    such a policy may do, a picture's size decides.

    Args:
        policy, bound: with one value for all images each.
    """
    told = []
    for total in SIZES:
        if all(policy.kept(layer, 0, total) == total for layer in range(num_layers)):
            continue
        try:
            check_bound(policy, bound, [total], num_layers)
        except PolicyError:
            told.append(True)
        else:
            told.append(False)
    return bool(told) and all(told)


def parse_task(keys: Mapping[str, Any] | None, tasks: Collection[str] | None) -> str | None:
    """Read from a request's extra arguments which task it belongs to.

    A task's policy is the operator's: the front end puts it in the place of the key, so that nothing
    behind it knows of tasks.

    Args:
        tasks: the tasks of the operator's profile, None where there is no profile.

    Returns:
        The task, or None: no ``flow_task``.

    Raises:
        PolicyError: (a ValueError) a policy beside it, an engine without a profile, or a task
            that the profile does not have.
    """
    if not keys or TASK_KEY not in keys:
        return None
    task = keys[TASK_KEY]
    own = next((key for key in POLICY_KEYS if key in keys), None)
    if own is not None:
        raise PolicyError(
            TASK_KEY, task, f"{own} is there as well, and the task has a policy; send one of them."
        )
    if tasks is None:
        raise PolicyError(
            TASK_KEY,
            task,
            "this engine has no profile of tasks; leave the key out, or start the engine with "
            '"default_policy": {"profile": "FILE"} in additional_config["vllm_flow"].',
        )
    if not isinstance(task, str) or task not in tasks:
        raise PolicyError(
            TASK_KEY, task, f"there is no such task; known tasks: {quoted(sorted(tasks))}."
        )
    return task
