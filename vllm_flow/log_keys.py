"""Reads the two keys by which a request has its attention logged, and which layers of it.

Answers do not depend on them. Knows nothing of vLLM, torch or prompts, like `policy_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.policy_error import PolicyError
from vllm_flow.user_text import shown

LOG_KEY = "flow_log_attention"
HEAT_KEY = "flow_log_attention_heat"
LOG_KEYS = (LOG_KEY, HEAT_KEY)


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
    keys: Mapping[str, Any] | None,
    num_layers: int,
    *,
    available: bool = True,
    attending: Sequence[int] = (),
) -> AttentionLog | None:
    """Read from a request's extra arguments what it logs of its attention.

    Args:
        keys: the request's extra arguments. ``true`` means every layer; through ``vllm_xargs`` it
            arrives as the integer 1 (and ``false`` as 0), since vLLM's schema has no booleans.
        num_layers: number of decoder layers of the model.
        available: whether the operator gave this engine a directory to log to.
        attending: the layers that attend, where others keep a state in the place of keys, or nothing: ``true`` means
            these. None where all do.

    Returns:
        What to log, or None: no ``flow_log_attention``, or false.

    Raises:
        PolicyError: (a ValueError) neither true, false nor a list of layers; a layer that is no
            integer, out of range, named twice or without attention; an empty list; heat without a
            log; an engine without a log.
    """
    keys = keys or {}
    wanted, heat = (_switch(keys.get(key, False)) for key in LOG_KEYS)
    if heat is None:
        raise PolicyError(HEAT_KEY, keys[HEAT_KEY], "it must be true or false.")
    if wanted is False:
        if heat:
            raise PolicyError(
                HEAT_KEY, keys[HEAT_KEY], f"there is nothing to add it to; send {LOG_KEY} too."
            )
        return None
    every = tuple(attending or range(num_layers))
    layers = every if wanted else _checked_layers(keys[LOG_KEY], num_layers)
    blind = [layer for layer in layers if layer not in every]
    if blind:
        raise PolicyError(
            LOG_KEY,
            keys[LOG_KEY],
            f"layer {blind[0]} keeps no keys, and gives no token a share; the layers "
            f"that attend are {', '.join(map(str, every))}.",
        )
    if not available:
        raise PolicyError(
            LOG_KEY,
            keys[LOG_KEY],
            "this engine has no attention log; leave the key out, or start the engine with "
            '"attention_log": "DIRECTORY" in additional_config["vllm_flow"].',
        )
    return AttentionLog(layers, heat)


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
            raise PolicyError(LOG_KEY, value, f"{shown(layer)} is not a layer; {allowed}")
        if not 0 <= layer < num_layers:
            raise PolicyError(LOG_KEY, value, f"there is no layer {shown(layer)}; {allowed}")
    if len(set(value)) < len(value):
        raise PolicyError(LOG_KEY, value, f"a layer is named twice; {allowed}")
    return tuple(sorted(value))
