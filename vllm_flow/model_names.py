"""Explains why a model that somebody named cannot be read, in words of the command line. (standard library only)

The hub's library takes a path that leads nowhere for a name of the hub, and complains of its letters; and where
the hub is not reached, it tries for more than a minute before it says so. So it is asked once beforehand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

HUB_SECONDS = 6.0
"""How long the hub has to answer."""
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


def check_hub(model: str) -> None:
    """Ask once, where a model would come from the hub, whether that is reached. If not, what is in the hub's cache
    is used from here on in this process and those it starts, as with HF_HUB_OFFLINE=1, and a line says so.

    Args:
        model: as it was named; anything but a name of the hub's is left alone.

    Raises:
        UnreadModel: the model is not in the cache either.
    """
    if Path(model).exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        return
    if any(
        _is_set(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE")
    ):
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if (problem := _unreached(hub)) is None:
        return
    cached = _hub_cache() / f"models--{model.replace('/', '--')}" / "snapshots"
    if not any((found / name).is_file() for found in cached.glob("*") for name in _CONFIGS):
        raise UnreadModel(
            f"{model!r} is no folder and not in the hub's cache ({_hub_cache()}), and {hub} is not reached "
            f"({problem}); name a folder, or fill the cache on a machine that reaches it."
        )
    print(f"{hub} is not reached ({problem}): what is in its cache is used.", file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # it has read the environment
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "on", "yes", "true")


def _hub_cache() -> Path:
    """Where the hub's library keeps what it has fetched."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


@lru_cache(maxsize=1)
def _unreached(hub: str) -> str | None:
    """Why the hub does not answer, None where it does, whatever it says."""
    said: list[str | None] = []

    def ask() -> None:
        try:
            urlopen(Request(hub, method="HEAD"), timeout=HUB_SECONDS).close()
        except HTTPError:
            said.append(None)
        except (OSError, ValueError) as error:
            said.append(str(getattr(error, "reason", error)))
        else:
            said.append(None)

    # A look-up of its name has no time-out of its own.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return said[0] if said else f"no answer within {HUB_SECONDS:g} seconds"


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
