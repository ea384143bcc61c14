"""Where an item's picture is, and how it is opened: a file, a cell of a parquet file, or base64 inside a text file."""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.pictures import (
    WHITE,
    Colour,
    PictureError,
    decode,
    decode_as_stored,
    read_bytes,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_CELL = "parquet://"
"""What a reference to a parquet cell begins with. No path can: `str(Path(...))` has no `//` but at its start."""
_PARQUET = re.compile(_CELL + r"(?P<file>.+)#row=(?P<row>[0-9]+)&column=(?P<column>.+)", re.DOTALL)


def parquet_image(path: Path, row: int, column: str = "image") -> str:
    """How an `Item` names an image that is embedded in a parquet file."""
    return f"{_CELL}{path}#row={row}&column={column}"


def parquet_place(image: str | None) -> tuple[Path, int] | None:
    """The parquet file and the row that `parquet_image` named; None for any other picture."""
    found = _PARQUET.fullmatch(image or "")
    return (Path(found["file"]), int(found["row"])) if found else None


_ENCODED = "base64://"
_SLICE = re.compile(
    _ENCODED + r"(?P<file>.+)#from=(?P<start>[0-9]+)&length=(?P<length>[0-9]+)", re.DOTALL
)


def encoded_image(path: Path, start: int, length: int) -> str:
    """How an `Item` names an image that stands in a text file in base64: from which byte on, and how many."""
    return f"{_ENCODED}{path}#from={start}&length={length}"


def image_file(image: str) -> Path:
    """The file that an item's image is in."""
    place = _PARQUET.fullmatch(image) or _SLICE.fullmatch(image)
    return Path(place["file"]) if place else Path(image)


def load_image(image: str, reading: str = "server", background: Colour = WHITE) -> Image:
    """Open an item's image as RGB.

    Args:
        reading: `server`, as vLLM's server reads it, or `stored`, as the benchmarks' official scripts
            do (see `Task`).
        background: what the server puts behind transparent pixels.

    Raises:
        PictureError: it cannot be had; says why.
    """
    if place := _PARQUET.fullmatch(image):
        data, name = _embedded(Path(place["file"]), int(place["row"]), place["column"])
    elif place := _SLICE.fullmatch(image):
        data, name = _decoded(Path(place["file"]), int(place["start"]), int(place["length"]))
    else:
        data, name = read_bytes(image), image
    if reading == "stored":
        return decode_as_stored(data, name)
    return decode(data, name, background)


def _decoded(path: Path, start: int, length: int) -> tuple[bytes, str]:
    name = f"{path}, {counted(length, 'byte')} from {start}"
    try:
        with path.open("rb") as file:
            file.seek(start)
            return base64.b64decode(file.read(length), validate=True), name
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise PictureError(f"{name}: no picture in base64 ({error}); was it replaced?") from None


def _embedded(path: Path, row: int, column: str) -> tuple[bytes, str]:
    """The image in one cell, bytes, the hub's struct of bytes and path, or a path; and its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{path}, row {row}, column {column!r}"
    start = 0
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise PictureError(f"{path}: no column {column!r}; is it the benchmark's file?")
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row < start + rows:
                    break
                start += rows
            else:
                raise PictureError(
                    f"{path}: {counted(start, 'row')}, so no row {row}; was it replaced?"
                )
        cell = _column(str(path), path.stat().st_mtime_ns, group, column)[row - start].as_py()
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file; check the path") from None
    except (pa.ArrowException, OSError) as error:
        raise PictureError(f"{name}: cannot be read ({error}); get the file again") from None
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell, name
    if not isinstance(cell, str):
        raise PictureError(f"{name}: no picture there; is it the benchmark's file?")
    return read_bytes(path.parent / cell), f"{path.parent / cell}"


@lru_cache(maxsize=1)
def _column(path: str, modified: int, group: int, column: str) -> Any:
    """One column of one row group. Items are read in order, so the last one is worth keeping;
    `modified` makes a rewritten file another key."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)
