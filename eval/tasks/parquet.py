"""Reads parquet files, rows or single columns, and names what is wrong in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_flow.eval.tasks.reading import DataError, Row, few


def parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """The named columns of a parquet file, row by row; `optional` ones only where the file has them."""
    with _parquet(path, columns) as file:
        present = file.schema_arrow.names
        wanted = [*columns, *(name for name in optional if name in present)]
        records = file.read(columns=wanted).to_pylist()
    return [Row(f"{path}, row {number}", values) for number, values in enumerate(records)]


@contextmanager
def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The open file, which has the columns; DataError where it cannot be read, also later on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            missing = [name for name in columns if name not in present]
            if missing:
                raise DataError(
                    f"{path}: no column {few(missing)} (the file has {few(present, 12)})"
                )
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except DataError:
        raise
    # pyarrow raises UnicodeDecodeError, a ValueError, for text that is none.
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: not a parquet file, or damaged ({reason[:200]})") from None


def parquet_files(data: Path, *patterns: str) -> list[Path]:
    """The parquet files below `data` whose names fit a pattern, in order; the first pattern that
    fits any wins."""
    for pattern in patterns:
        found = sorted(data.rglob(pattern))
        if found:
            return found
    return []


def parquet_cells(path: Path, column: str) -> Iterator[Any]:
    """The values of one column of a parquet file, batch by batch: images are large."""
    with _parquet(path, [column]) as file:
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            yield from batch.column(0).to_pylist()
