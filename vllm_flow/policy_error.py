"""The error by which a request's keys are refused: one sentence that names key, value and remedy.

A module of its own, since whoever catches the error has no need of what checks the keys.
"""

from __future__ import annotations

from typing import Any


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


def shown(value: Any) -> str:
    """The value as a message shows it, cut so that a hostile one cannot fill the log."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        # repr of an enormous integer is slow and, past 4300 digits, an error of its own.
        return f"<integer of {value.bit_length()} bits>"
    if isinstance(value, (list, tuple)):
        text = f"[{', '.join(shown(item) for item in value[:40])}{', ...' * (len(value) > 40)}]"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
