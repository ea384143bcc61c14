"""Reads the files tasks and answers come in, JSON, JSON lines and parquet, and names what is wrong in them.

Knows nothing of tasks: a `DataError` says which file, which line or row, and what was expected there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


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
            has = ", ".join(sorted(self.values)) or "nothing"
            raise DataError(f"{self.place}: no {key!r} (the record has {has})")
        value = self.values[key]
        # JSON's true and false are ints to isinstance.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, str))):
            raise DataError(f"{self.place}: {key!r} is {value!r}, not {_kinds(kind)}")
        return value

    def identifier(self, key: str) -> str:
        """An id under `key`, written as a number or as a string; as a string."""
        return str(self.get(key, (int, str)))


def _kinds(kind: type | tuple[type, ...]) -> str:
    names = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(names.get(one, one.__name__) for one in kinds)


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte-order mark; DataError where it cannot be read."""
    if path.is_dir():
        raise DataError(f"{path} is a directory, not a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path, kind: type = object) -> Any:
    """A JSON file whose outermost value is of `kind`."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(value, kind):
        raise DataError(f"{path}: the file holds {_kinds(type(value))}, not {_kinds(kind)}")
    return value


def read_json_lines(path: Path) -> list[Row]:
    """A file of one JSON object per line; empty lines are skipped."""
    rows = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); expected one object per line"
            ) from None
        if not isinstance(values, dict):
            raise DataError(
                f"{place}: expected an object like {{...}}, found {_kinds(type(values))}"
            )
        rows.append(Row(place, values))
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


def parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """The named columns of a parquet file, row by row; `optional` ones only where the file has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error})") from None
    with file:
        present = file.schema_arrow.names
        missing = [name for name in columns if name not in present]
        if missing:
            raise DataError(
                f"{path}: no column {', '.join(missing)} (the file has {', '.join(present)})"
            )
        wanted = [*columns, *(name for name in optional if name in present)]
        records = file.read(columns=wanted).to_pylist()
    return [Row(f"{path}, row {number}", values) for number, values in enumerate(records)]


def parquet_files(data: Path, *patterns: str) -> list[Path]:
    """The parquet files below `data` whose names fit a pattern, in order; the first pattern that
    fits any wins."""
    for pattern in patterns:
        found = sorted(data.rglob(pattern))
        if found:
            return found
    return []


def directory(data: Path) -> Path:
    """`data` as a Path; DataError unless it is a directory."""
    data = Path(data)
    if not data.is_dir():
        state = "is not a directory" if data.exists() else "no such directory"
        raise DataError(f"{data}: {state}")
    return data


def few(names: Iterable[Any], limit: int = 5) -> str:
    """The first names of a list, for messages: `1, 2, 3 and 97 more`."""
    listed = [str(name) for name in names]
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"


def by_unique(rows: Iterable[tuple[Any, Row]], what: str) -> Mapping[Any, Row]:
    """Rows under their keys; DataError where a key comes twice."""
    found: dict[Any, Row] = {}
    for key, row in rows:
        if key in found:
            shown = key if not isinstance(key, tuple) else ", ".join(str(part) for part in key)
            raise DataError(f"{row.place}: {what} {shown} comes twice (first: {found[key].place})")
        found[key] = row
    return found


def first_directory_with(data: Path, names: Sequence[str], folders: Sequence[str]) -> Path:
    """Where the files `names` are: the first of `folders` (below `data`) that holds one of them, else
    the first folder."""
    for folder in folders:
        if any((data / folder / name).is_file() for name in names):
            return data / folder
    return data / folders[0]


def first_file(data: Path, name: str, folders: Sequence[str]) -> Path | None:
    """The file `name` in the first of `folders` (below `data`) that has it; None where none does."""
    return next((data / f / name for f in folders if (data / f / name).is_file()), None)


def parquet_present(path: Path, column: str) -> list[bool]:
    """For each row of a parquet file whether `column` holds something; a hub's image, a struct of
    bytes and path, does if either is there. Reads batch by batch: images are large."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    present: list[bool] = []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            values = batch.column(0)
            valid = pc.is_valid(values)
            if hasattr(values.type, "fields"):
                parts = [
                    pc.is_valid(pc.struct_field(values, [i])) for i in range(values.type.num_fields)
                ]
                some = parts[0]
                for part in parts[1:]:
                    some = pc.or_(some, part)
                valid = pc.and_(valid, some)
            present += valid.to_pylist()
    return present
