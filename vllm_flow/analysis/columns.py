"""Reads columns of the analysis' Parquet files and names the file where they are not what they must be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_columns(path: Path, columns: Mapping[str, str], what: str) -> Any:
    """A `pyarrow.Table` of the columns, in their types (pyarrow's aliases, such as `int64`).

    Args:
        what: what the file must be, for messages.

    Raises:
        ValueError: it is damaged, lacks a column, or has another type or nothing in one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    missing = [name for name in columns if name not in column_names(path)]
    if missing:
        raise ValueError(f"{path} is no {what} file: it lacks {', '.join(missing)}")
    try:
        table = pq.read_table(path, columns=schema.names).select(schema.names).cast(schema)
        empty = [name for name in columns if table[name].null_count]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise ValueError(f"{path} is no {what} file: {error}") from None
    if empty:
        raise ValueError(f"{path} is no {what} file: values of {', '.join(empty)} are missing")
    return table


def column_names(path: Path) -> list[str]:
    """What columns a Parquet file has; ValueError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None
