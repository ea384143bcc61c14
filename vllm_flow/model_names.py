"""Explains why a model that somebody named cannot be read, in words of the command line. (pure)

The hub's library takes a path that leads nowhere for a name of the hub, and complains of its letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_OFFLINE = ("outgoing traffic has been disabled", "offline mode is enabled")
_CONFIGS = ("config.json", "params.json")


class UnreadModel(ValueError):
    """There is no model of this name; says why not."""


def absence(model: str, error: BaseException) -> str | None:
    """That there is no such model, and where it was looked for; None where something else is wrong.

    Args:
        model: as it was named: a folder, or a name of the hub.
        error: what reading it raised.
    """
    path = Path(model)
    if path.is_dir():
        found = any((path / name).is_file() for name in _CONFIGS)
        return None if found else "there is no config.json in this folder"
    if not path.exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        return "there is no such folder"
    if any(sign in text for text in _chain(error) for sign in _OFFLINE):
        return "it is no folder and not in the hub's cache; with HF_HUB_OFFLINE=0 the hub is asked"
    return None


def _chain(error: BaseException | None) -> Iterator[str]:
    """What an error and its causes say."""
    for _ in range(20):
        if error is None:
            return
        yield str(error)
        error = error.__cause__ or error.__context__


def why_unread(model: str, error: BaseException) -> str:
    """:func:`absence`, else the first line of the error; one line without the model's name and a full stop."""
    return absence(model, error) or next(iter(str(error).strip().splitlines()), repr(error))
