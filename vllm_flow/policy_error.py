"""The error by which a request's keys are refused: one sentence that names key, value and remedy.

A module of its own, since whoever catches the error has no need of what checks the keys.
"""

from __future__ import annotations

from typing import Any

from vllm_flow.user_text import shown


class PolicyError(ValueError):
    """A request's ``flow_*`` keys cannot be honoured; the message names key, value and remedy."""

    def __init__(self, key: str, value: Any, reason: str) -> None:
        self.key = short(key)
        self.value = value
        super().__init__(f"{self.key}={shown(value)}: {reason}")


def short(name: str) -> str:
    """A name that a client chose, which may be of any length, or hold what no answer can: half a character, a
    line's end."""
    return name if len(name) <= 80 and name.isprintable() else shown(name)
