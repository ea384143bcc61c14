"""Reads the files tasks and answers come in, JSON, JSON lines and pickles, and names what is wrong in them.

Knows nothing of tasks: a `DataError` says which file, which line or row, and what was expected there.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_flow.user_text import NotJSON, as_written, parse_json, whole_number


class DataError(ValueError):
    """A file is missing, malformed, or does not belong to the others; the message is for the user."""


class Row(NamedTuple):
    """One record of a file, with what is needed to point at it."""

    place: str
    """Where it stands, for messages: `answers.jsonl, line 3`."""
    values: dict[str, Any]

    def get(self, key: str, kind: type | tuple[type, ...] = object) -> Any:
        """The value under `key`; DataError where it is missing or not of `kind`."""
        if key not in self.values:
            has = few(sorted(self.values), 12) or "nothing"
            raise DataError(f"{self.place}: no {key!r} (the record has {has})")
        value = self.values[key]
        # JSON's true and false are ints to isinstance.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, str))):
            raise DataError(f"{self.place}: {key!r} is {brief(value)}, not {_kinds(kind)}")
        return value

    def identifier(self, key: str) -> str:
        """An id under `key`, written as a number or as a string; as a string."""
        return str(self.get(key, (int, str)))

    def texts(self, key: str, optional: bool = False) -> list[str]:
        """A list of texts under `key`; where it is optional, empty where there is null instead."""
        found = self.get(key, (list, type(None)) if optional else list) or []
        if not all(isinstance(one, str) for one in found):
            raise DataError(f"{self.place}: {key!r} is {brief(found)}, not a list of texts")
        return list(found)

    def number(self, key: str, what: str) -> int:
        """A whole number >= 0 under `key`, written as a number or as a string; `what` says of what."""
        found = whole_number(self.identifier(key))
        if found is None:
            raise DataError(f"{self.place}: {key!r} is {brief(self.values[key])}, not {what}")
        return found


def brief(value: Any) -> str:
    """A value as a message shows it."""
    return clipped(as_written(value))


def clipped(text: str) -> str:
    """A text as a message shows it, where it needs no quotes."""
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _kinds(kind: type | tuple[type, ...]) -> str:
    names = {
        str: "text",
        int: "a whole number",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(names.get(one, one.__name__) for one in kinds)


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte-order mark; DataError where it cannot be read."""
    if os.path.isdir(path):
        raise DataError(f"{path} is a directory, not a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from None


def read_json(path: Path, kind: type = object) -> Any:
    """A JSON file whose outermost value is of `kind`."""
    return _json(path, read_text(path), kind)


def read_json_lines(path: Path) -> list[Row]:
    """A file of one JSON object per line; empty lines are skipped."""
    return _lines(path, read_text(path))


def read_records(path: Path, what: str = "answers") -> list[Row]:
    """The records of a file, JSON lines or one JSON list; DataError where there are none (of `what`).

    The file is read once, so that a pipe will do (`/dev/stdin`, `<(...)`).
    """
    text = read_text(path)
    is_list = text.lstrip().startswith("[")
    rows = json_rows(path, _json(path, text, list)) if is_list else _lines(path, text)
    if not rows:
        piped = "" if os.path.isfile(path) else " (a pipe can be read only once)"
        raise DataError(f"{path}: no {what} in it{piped}")
    return rows


def _json(path: Path, text: str, kind: type) -> Any:
    try:
        value = parse_json(text)
    except NotJSON as error:
        line = "" if error.line is None else f", line {error.line}"
        raise DataError(f"{path}{line}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise DataError(f"{path}: the file holds {_kinds(type(value))}, not {_kinds(kind)}")
    return value


def _lines(path: Path, text: str) -> list[Row]:
    rows = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = parse_json(line)
        except NotJSON as error:
            raise DataError(f"{place}: not JSON ({error}); expected one object per line") from None
        if not isinstance(values, dict):
            raise DataError(
                f"{place}: expected an object like {{...}}, found {_kinds(type(values))}"
            )
        rows.append(Row(place, values))
    return rows


def named_rows(path: Path, content: Mapping[str, Any], what: str) -> list[tuple[str, Row]]:
    """The objects under the keys of an object read from `path`; `what` names one of them in messages."""
    rows = []
    for key, values in content.items():
        place = f"{path}, {what} {brief(key)}"
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected an object, found {_kinds(type(values))}")
        rows.append((key, Row(place, values)))
    return rows


def json_rows(path: Path, records: Iterable[Any], where: str = "record") -> list[Row]:
    """The objects of a list read from `path`; `where` names one of them in messages."""
    rows = []
    for number, values in enumerate(records):
        place = f"{path}, {where} {number}"
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected an object, found {_kinds(type(values))}")
        rows.append(Row(place, values))
    return rows


class _Plain(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers; any class or function in a pickle is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_plain_pickle(path: Path, kind: type = object) -> Any:
    """A pickle of plain values, such as Python 2 wrote; nothing in it is executed.

    DataError where it holds anything else, or a value that is not of `kind`.
    """
    try:
        with path.open("rb") as file:
            value = _Plain(file, encoding="latin-1").load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # whatever bytes make of the unpickler
        raise DataError(f"{path}: not a pickle of plain values ({error})") from None
    if not isinstance(value, kind):
        raise DataError(f"{path}: the file holds {_kinds(type(value))}, not {_kinds(kind)}")
    return value


def directory(data: Path) -> Path:
    """`data` as a Path; DataError unless it is a directory."""
    data = Path(data)
    if not os.path.isdir(data):
        state = "is not a directory" if os.path.exists(data) else "no such directory"
        raise DataError(
            f"{data}: {state}; which files it is to hold, docs/evaluation.md#tasks says by the task's name, "
            "or the package that brings the task"
        )
    return data


def few(names: Iterable[Any], limit: int = 5) -> str:
    """The first names of a list, for messages: `1, 2, 3 and 97 more`. Of long ones both ends: a line's place ends
    in its number."""
    named = [str(each) for each in names]
    listed = [name if len(name) <= 80 else f"{name[:30]}...{name[-45:]}" for name in named]
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"


def by_unique(rows: Iterable[tuple[Any, Row]], what: str) -> Mapping[Any, Row]:
    """Rows under their keys; DataError where a key comes twice."""
    found: dict[Any, Row] = {}
    for key, row in rows:
        if key in found:
            shown = few(key if isinstance(key, tuple) else [key])
            raise DataError(f"{row.place}: {what} {shown} comes twice (first: {found[key].place})")
        found[key] = row
    return found


def first_directory_with(data: Path, names: Sequence[str], folders: Sequence[str]) -> Path:
    """Where the files `names` are: the first of `folders` (below `data`) that holds one of them, else
    the first folder."""
    for folder in folders:
        # os.path: whatever a name is (too long, odd characters), it is asked about, not complained of.
        if any(os.path.isfile(data / folder / name) for name in names):
            return data / folder
    return data / folders[0]


def first_file(data: Path, name: str, folders: Sequence[str]) -> Path | None:
    """The file `name` in the first of `folders` (below `data`) that has it; None where none does."""
    return next((data / f / name for f in folders if (data / f / name).is_file()), None)
