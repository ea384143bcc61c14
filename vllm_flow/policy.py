"""What a request may ask for: policy and attention log, their flat keys and every validation rule.

Knows nothing of vLLM, torch or prompts: both are read from the plain mapping that arrives as
``SamplingParams.extra_args`` (offline) or ``vllm_xargs`` (OpenAI-compatible server).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

KEY_PREFIX = "flow_"
CLIFF_KEY = "flow_cliff"
TASK_KEY = "flow_task"
LOG_KEY = "flow_log_attention"
HEAT_KEY = "flow_log_attention_heat"
POLICY_KEYS = (CLIFF_KEY,)
"""Keys that decide what is evicted, as scheduler and workers see them."""
LOG_KEYS = (LOG_KEY, HEAT_KEY)
"""Keys that decide what is written down; answers do not depend on them."""
REQUEST_KEYS = (*POLICY_KEYS, TASK_KEY, *LOG_KEYS)
"""Every request key this version understands; any other ``flow_*`` key is an error."""

_KINDS = {
    bool: "a boolean",
    float: "a float",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""What a value is, in words that fit JSON and Python."""


class PolicyError(ValueError):
    """A request's ``flow_*`` keys cannot be honoured; the message names key, value and remedy."""

    def __init__(self, key: str, value: Any, reason: str) -> None:
        self.key = key
        self.value = value
        super().__init__(f"{key}={_shown(value)}: {reason}")


@dataclass(frozen=True, slots=True)
class FlowPolicy:
    """Evict every image token from decoder layers with 0-based index >= ``cliff``.

    Layers below the cliff see the whole image, so ``cliff`` is the number of layers that do
    ("From Redundancy to Relevance: Information Flow in LVLMs Across Reasoning Tasks", section 3).
    """

    cliff: int

    def request_keys(self) -> dict[str, int]:
        """The flat form a client sends; :func:`parse_policy` reads it back."""
        return {CLIFF_KEY: self.cliff}


def parse_policy(keys: Mapping[str, Any] | None, num_layers: int) -> FlowPolicy | None:
    """Read a policy from a request's extra arguments.

    Args:
        keys: the request's extra arguments; keys without the ``flow_`` prefix belong to others
            and are left alone.
        num_layers: number of decoder layers of the model.

    Returns:
        The policy, or None for the baseline: no ``flow_cliff``, or one equal to ``num_layers``.

    Raises:
        PolicyError: (a ValueError) an unknown ``flow_*`` key, a value that is no integer, or one
            outside ``0..num_layers``.
    """
    if not keys:
        return None
    for key, value in keys.items():
        if isinstance(key, str) and key.startswith(KEY_PREFIX) and key not in REQUEST_KEYS:
            close = difflib.get_close_matches(key, REQUEST_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {_known()}."
            raise PolicyError(key, value, f"vLLM-Flow does not know this key; {hint}")
    if CLIFF_KEY not in keys:
        return None
    cliff = _checked_cliff(keys[CLIFF_KEY], num_layers)
    return None if cliff == num_layers else FlowPolicy(cliff)


def admit(
    keys: Mapping[str, Any] | None,
    num_layers: int,
    *,
    allowed: bool = True,
    strongest: FlowPolicy | None = None,
) -> FlowPolicy | None:
    """:func:`parse_policy` within an operator's bounds.

    Args:
        allowed: whether requests may carry a policy at all.
        strongest: the most they may evict.

    Raises:
        PolicyError: also where the operator's bounds exclude what is asked for.
    """
    policy = parse_policy(keys, num_layers)
    if keys and CLIFF_KEY in keys and not allowed:
        raise PolicyError(
            CLIFF_KEY, keys[CLIFF_KEY], "the operator of this server sets the policy; leave it out."
        )
    if policy is not None and strongest is not None and policy.cliff < strongest.cliff:
        raise PolicyError(
            CLIFF_KEY,
            policy.cliff,
            f"the operator of this server allows layers from {strongest.cliff} on; it must be an "
            f"integer from {strongest.cliff} to {num_layers}.",
        )
    return policy


def parse_task(keys: Mapping[str, Any] | None, tasks: Collection[str] | None) -> str | None:
    """Read from a request's extra arguments which task it belongs to.

    A task's policy is the operator's: the front end puts it in the place of the key, so that nothing
    behind it knows of tasks.

    Args:
        tasks: the tasks of the operator's profile, None where there is no profile.

    Returns:
        The task, or None: no ``flow_task``.

    Raises:
        PolicyError: (a ValueError) a ``flow_cliff`` beside it, an engine without a profile, or a task
            that the profile does not have.
    """
    if not keys or TASK_KEY not in keys:
        return None
    task = keys[TASK_KEY]
    if CLIFF_KEY in keys:
        raise PolicyError(
            TASK_KEY,
            task,
            f"{CLIFF_KEY} is there as well, and the task has a cliff; send one of them.",
        )
    if tasks is None:
        raise PolicyError(
            TASK_KEY,
            task,
            "this engine has no profile of tasks; leave the key out, or start the engine with "
            '"default_policy": {"profile": "FILE"} in additional_config["vllm_flow"].',
        )
    if not isinstance(task, str) or task not in tasks:
        known = ", ".join(repr(name) for name in sorted(tasks))
        raise PolicyError(TASK_KEY, task, f"there is no such task; known tasks: {known}.")
    return task


@dataclass(frozen=True, slots=True)
class AttentionLog:
    """Write down where each answer token's attention goes, in these decoder layers."""

    layers: tuple[int, ...]
    """0-based, ascending, none twice, at least one."""
    heat: bool = False
    """Also the share of every single image token."""

    def request_keys(self) -> dict[str, Any]:
        """The flat form a client sends; :func:`parse_log` reads it back."""
        return {LOG_KEY: list(self.layers), **({HEAT_KEY: True} if self.heat else {})}


def parse_log(
    keys: Mapping[str, Any] | None, num_layers: int, *, available: bool = True
) -> AttentionLog | None:
    """Read from a request's extra arguments what it logs of its attention.

    Args:
        keys: the request's extra arguments. ``true`` means every layer; through ``vllm_xargs`` it
            arrives as the integer 1 (and ``false`` as 0), since vLLM's schema has no booleans.
        num_layers: number of decoder layers of the model.
        available: whether the operator gave this engine a directory to log to.

    Returns:
        What to log, or None: no ``flow_log_attention``, or false.

    Raises:
        PolicyError: (a ValueError) neither true, false nor a list of layers; a layer that is no
            integer, out of range or named twice; an empty list; heat without a log; an engine
            without a log.
    """
    wanted = _switch(keys[LOG_KEY]) if keys and LOG_KEY in keys else False
    heat = _switch(keys[HEAT_KEY]) if keys and HEAT_KEY in keys else False
    if keys and heat is None:
        raise PolicyError(HEAT_KEY, keys[HEAT_KEY], "it must be true or false.")
    if not keys or wanted is False:
        if keys and heat:
            raise PolicyError(
                HEAT_KEY, keys[HEAT_KEY], f"there is nothing to add it to; send {LOG_KEY} too."
            )
        return None
    layers = tuple(range(num_layers)) if wanted else _checked_layers(keys[LOG_KEY], num_layers)
    if not available:
        raise PolicyError(
            LOG_KEY,
            keys[LOG_KEY],
            "this engine has no attention log; leave the key out, or start the engine with "
            '"attention_log": "DIRECTORY" in additional_config["vllm_flow"].',
        )
    return AttentionLog(layers, bool(heat))


def _switch(value: Any) -> bool | None:
    """True, false, or None for anything else. JSON's true may have become 1 on the way."""
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def _checked_layers(value: Any, num_layers: int) -> tuple[int, ...]:
    allowed = (
        f"it must be true (every layer), false, or a list of different layers from 0 to "
        f"{num_layers - 1}."
    )
    if not isinstance(value, (list, tuple)):
        raise PolicyError(LOG_KEY, value, allowed)
    if not value:
        raise PolicyError(LOG_KEY, value, f"no layer is named; {allowed}")
    for layer in value:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise PolicyError(LOG_KEY, value, f"{_shown(layer)} is not a layer; {allowed}")
        if not 0 <= layer < num_layers:
            raise PolicyError(LOG_KEY, value, f"there is no layer {_shown(layer)}; {allowed}")
    if len(set(value)) < len(value):
        raise PolicyError(LOG_KEY, value, f"a layer is named twice; {allowed}")
    return tuple(sorted(value))


def _checked_cliff(value: Any, num_layers: int) -> int:
    allowed = (
        f"it must be an integer from 0 (no layer sees the image) to {num_layers} "
        "(the number of decoder layers: nothing is evicted)."
    )
    # bool is an int in Python, yet `true` is never a layer.
    if isinstance(value, bool) or not isinstance(value, int):
        kind = _KINDS.get(type(value), type(value).__name__)
        raise PolicyError(CLIFF_KEY, value, f"{kind} is not a layer; {allowed}")
    if not 0 <= value <= num_layers:
        raise PolicyError(CLIFF_KEY, value, f"there is no such layer; {allowed}")
    return value


def _known() -> str:
    return ", ".join(repr(key) for key in REQUEST_KEYS)


def _shown(value: Any) -> str:
    """The value as the message shows it, cut so that a hostile one cannot fill the log."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        # repr of an enormous integer is slow and, past 4300 digits, an error of its own.
        return f"<integer of {value.bit_length()} bits>"
    if isinstance(value, (list, tuple)):
        text = f"[{', '.join(_shown(item) for item in value[:40])}{', ...' * (len(value) > 40)}]"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
