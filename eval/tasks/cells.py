"""Pictures that files carry inside: what tells them apart, how large they are, where they stand.

Hub files embed a picture in each row, questions about one picture repeat it. Its digest then names it, so
that statistics know whose questions belong together (`Item.picture_of`).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

from vllm_flow.counts import counted
from vllm_flow.eval.tasks.parquet import parquet_cells, parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.reading import DataError, Row

Found = TypeVar("Found")


def digest(data: bytes) -> str:
    """A name for a picture's bytes."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def file_digest(path: Path) -> str | None:
    """A name for a picture file's bytes; None where it cannot be read, which is told when it is asked about."""
    try:
        return digest(path.read_bytes())
    except OSError:
        return None


def picture_digests(path: Path, column: str = "image") -> list[str | None]:
    """For each row of a parquet file a name of the picture in it, None where it has none; reads all of them once."""
    return _each(path, column, digest, lacking=True)


def rows_and_pictures(
    path: Path, columns: Sequence[str], column: str = "image"
) -> list[tuple[Row, str, str]]:
    """The rows of a hub's parquet file, each with how an `Item` names its picture, and the picture's digest."""
    rows, digests = parquet_rows(path, columns), _each(path, column, digest)
    return [
        (row, parquet_image(path, number, column), name)
        for number, (row, name) in enumerate(zip(rows, _as_many(path, digests, rows), strict=True))
    ]


def _as_many(path: Path, found: list[Found], rows: Sequence[Row]) -> list[Found]:
    if len(found) != len(rows):
        raise DataError(
            f"{path}: {counted(len(rows), 'row')} and {counted(len(found), 'picture')}; the file is damaged"
        )
    return found


def picture_sizes(path: Path, column: str = "image") -> list[tuple[int, int]]:
    """For each row of a parquet file the width and the height of the picture in it, as stored."""
    return _each(path, column, size_of)


@overload
def _each(path: Path, column: str, look: Callable[[bytes], Found]) -> list[Found]: ...
@overload
def _each(
    path: Path, column: str, look: Callable[[bytes], Found], *, lacking: Literal[True]
) -> list[Found | None]: ...
def _each(path: Path, column: str, look: Any, *, lacking: bool = False) -> list[Any]:
    """What is seen in each row's picture; `lacking` rows, which hold nothing, have None."""
    found: list[Any] = []
    for number, cell in enumerate(parquet_cells(path, column)):
        if lacking and not any(cell.values() if isinstance(cell, dict) else [cell]):
            found.append(None)
            continue
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(cell, dict) and data is None and cell.get("path"):
            try:
                data = (path.parent / cell["path"]).read_bytes()
            except OSError as error:
                raise DataError(f"{path}, row {number}: {error}") from None
        if not isinstance(data, bytes):
            raise DataError(f"{path}, row {number}: no picture in {column!r}")
        try:
            found.append(look(data))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}, row {number}: no picture in {column!r} ({error})") from None
    return found


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of a picture from its first bytes; OSError where they are no picture."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


class Cell(NamedTuple):
    """Where a cell's text stands in its file."""

    start: int
    length: int


def tsv_rows(path: Path, long: str) -> Iterator[tuple[Row, Cell]]:
    """The rows of a tab-separated file with a header, and where each one's text in the column `long` stands.

    Fields may be quoted, and then hold tabs and line ends, as pandas writes them; the text of `long` is not
    (base64 has nothing to quote). Empty fields are None.
    """
    header: list[str] = []
    for start, record in _records(path):
        try:
            values = next(
                csv.reader(io.StringIO(record.decode("utf-8"), newline=""), delimiter="\t")
            )
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}, byte {start}: not a table ({error})") from None
        if not header:
            header = [name.lstrip("\ufeff") for name in values]
            if long not in header:
                raise DataError(
                    f"{path}: no column {long!r} (the file has {', '.join(header[:12])})"
                )
            continue
        if len(values) != len(header):
            raise DataError(
                f"{path}, byte {start}: {counted(len(values), 'field')}, the header has {len(header)}"
            )
        row = Row(
            f"{path}, byte {start}", dict(zip(header, (v or None for v in values), strict=True))
        )
        text = (row.values[long] or "").encode()
        yield row, Cell(start + record.find(text), len(text))


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Byte offsets and bytes of records; a record goes on while a quotation is open."""
    csv.field_size_limit(1 << 30)
    start, kept = 0, b""
    try:
        with path.open("rb") as file:
            for line in file:
                kept += line
                if kept.count(b'"') % 2 == 0:
                    if kept.strip():
                        yield start, kept
                    start, kept = start + len(kept), b""
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if kept.strip():
        raise DataError(f"{path}, byte {start}: a quotation does not end; is the file whole?")
