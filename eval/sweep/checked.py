"""Reads a run's files and refuses what is damaged, so that nobody after this meets it.

Knows the kinds of what stands in them, not what they are for; see records.py for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vllm_flow.exits import Refused
from vllm_flow.user_text import parse_json, shown

LAST = 253402300800_000000
"""Microseconds to the year 10000, which Python's datetime does not know."""


class RunError(Refused):
    """A run directory cannot be used as asked; the message is for the user."""


def read_meta(path: Path, version: int) -> dict[str, Any]:
    """The object in `run.json`.

    Raises:
        RunError: it is not there, of another version of the format, or damaged.
    """
    try:
        meta = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{path.parent} holds no run (no run.json); `vllm-flow eval` makes one."
        ) from None
    except ValueError as error:
        raise RunError(_damaged(path, str(error))) from None
    if not isinstance(meta, dict):
        raise RunError(_damaged(path, "it is no JSON object"))
    if "version" not in meta:
        raise RunError(_damaged(path, "it has no version"))
    if meta["version"] != version:
        raise RunError(
            f"{path.parent} was written by another version of the format ({shown(meta['version'])}); this one "
            f"reads {version}: take the vLLM-Flow that wrote it, or name another directory."
        )
    wrong = [name for name, fits in FITS.items() if name in meta and not fits(meta[name])]
    if wrong:
        raise RunError(_damaged(path, f"{wrong[0]} is {shown(meta[wrong[0]])}"))
    return meta


def _damaged(path: Path, why: str) -> str:
    """Of `run.json`, which says what the answers beside it are of: nobody can write it anew."""
    return f"{path} is damaged ({why}); put back a copy of it, or name another directory."


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _policies(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("kind"), str)
        and (one.get("cliff") is None or _whole(one["cliff"]))
        and (one.get("side") is None or _whole(one["side"]))
        and isinstance(one.get("keys") or {}, dict)
        for one in value
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1


def _sessions(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


FITS: Mapping[str, Callable[[Any], bool]] = {
    "tasks": _names,
    "policies": _policies,
    "sessions": _sessions,
    "num_layers": _whole,
    "tolerance": _share,
    "versions": lambda value: isinstance(value, Mapping),
}
"""Entries that are looked into, and what they must be."""


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a table of a schema, or of some of its columns.

    Raises:
        RunError: it is damaged, or no such table; says what to do.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    try:
        table = pq.read_table(path, columns=wanted.names).select(wanted.names).cast(wanted)
        table.validate(full=True)
        for field in wanted:
            if pa.types.is_timestamp(field.type):
                bounds = pc.min_max(table[field.name].cast(pa.int64()))
                if not 0 <= (bounds["min"].as_py() or 0) <= (bounds["max"].as_py() or 0) < LAST:
                    raise ValueError(f"{field.name} is no date")
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and resume.") from None
    return table
