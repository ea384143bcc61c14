"""What a task is: items to ask, a score for each answer, metrics from summed counts.

A task knows its data files and its official scoring rule; it knows nothing of models, engines,
policies or of how answers were obtained. Adding one: see `vllm_flow.eval.tasks`.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Totals = Mapping[str, float | NDArray[np.float64]]
"""Summed counts: numbers, or arrays of one shape (one entry per bootstrap sample)."""
Metrics = dict[str, float | NDArray[np.float64]]
"""Metrics of the same shape; shares lie in [0, 1]."""


@dataclass(frozen=True)
class Item:
    """One question on at most one picture."""

    id: str
    """Unique within the task."""
    text: str
    """The user's text, without conversation template and without an image placeholder."""
    image: str | None
    """A file's path, or `file.parquet#row=12&column=image`; `load_image` opens both. The file need
    not exist when items are read."""
    truth: Mapping[str, Any]
    """Everything scoring needs; JSON-serialisable."""
    group: str = ""
    """A part of the task that is also scored by itself, e.g. POPE's category."""


@dataclass(frozen=True)
class Scored:
    """What one answer is worth."""

    id: str
    parsed: Any
    """What was read from the answer; JSON-serialisable."""
    score: float
    """This item's own score in [0, 1]; higher is better, also where the task's metrics fall."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What the task's metrics are made of, to be summed over items; an absent name counts 0."""
    group: str = ""


class Task(ABC):
    """A benchmark. Implementations are frozen dataclasses whose fields are the task's options."""

    name: str
    """What the command line and the run directory call it; variants have names of their own."""
    max_tokens: int
    """Output tokens the official protocol allows."""
    headline: str
    """The metric that is reported first."""
    higher_is_better: bool = True
    """Of the headline metric."""
    image_preparation: Literal["pad", "plain"] = "pad"
    """`pad`: to a square with the CLIP mean colour, as LLaVA-1.5 does; `plain`: left alone."""
    binary: bool = True
    """Whether an item's score is 0 or 1 (then differences are tested by McNemar's test, else by a
    paired bootstrap)."""

    @abstractmethod
    def read(self, data: Path) -> list[Item]:
        """The items under the directory `data`, in the official order.

        Raises `DataError` where files are missing or malformed. The module's docstring lists the
        layouts that are found.
        """

    @abstractmethod
    def score(self, item: Item, text: str) -> Scored:
        """Score an answer as the model gave it."""

    @abstractmethod
    def metrics(self, totals: Totals) -> Metrics:
        """The task's metrics from summed counts, numbers or arrays alike; 0/0 is 0."""


def sum_counts(scored: Iterable[Scored]) -> dict[str, float]:
    """The counts of many items, added up."""
    totals: dict[str, float] = {}
    for one in scored:
        for name, count in one.counts.items():
            totals[name] = totals.get(name, 0.0) + count
    return totals


def ratio(numerator: Any, denominator: Any) -> Any:
    """`numerator / denominator`, elementwise for arrays; 0 where the denominator is 0."""
    top, bottom = np.broadcast_arrays(
        np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    )
    result = np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0)
    return result if result.ndim else float(result)


_PARQUET = re.compile(r"(?P<file>.+)#row=(?P<row>\d+)&column=(?P<column>.+)", re.DOTALL)


def parquet_image(path: Path, row: int, column: str = "image") -> str:
    """How an `Item` names an image that is embedded in a parquet file."""
    return f"{path}#row={row}&column={column}"


def load_image(image: str) -> Image:
    """Open an item's image as RGB.

    Raises FileNotFoundError where the file is missing, IndexError or KeyError where a parquet file
    has no such row or column, and PIL's UnidentifiedImageError where the bytes are no image.
    """
    from PIL import Image  # EXIF orientation is left alone, as the official scripts leave it

    place = _PARQUET.fullmatch(image)
    source: Path | io.BytesIO
    if place is None:
        source = Path(image)
    else:
        path = Path(place["file"])
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file (for the image {image})")
        source = _embedded(path, int(place["row"]), place["column"])
    with Image.open(source) as opened:
        return opened.convert("RGB")


def _embedded(path: Path, row: int, column: str) -> io.BytesIO | Path:
    """The image in one cell: bytes, the hub's struct of bytes and path, or a path."""
    import pyarrow.parquet as pq

    start = 0
    with pq.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise KeyError(f"{path} has no column {column!r}")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < start + rows:
                break
            start += rows
        else:
            raise IndexError(f"{path} has {start} rows, so no row {row}")
    cell = _column(str(path), path.stat().st_mtime_ns, group, column)[row - start].as_py()
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if cell is None:
        raise FileNotFoundError(f"{path}: row {row} has no image in column {column!r}")
    return io.BytesIO(cell) if isinstance(cell, bytes) else path.parent / cell


@lru_cache(maxsize=1)
def _column(path: str, modified: int, group: int, column: str) -> Any:
    """One column of one row group. Items are read in order, so the last one is worth keeping;
    `modified` makes a rewritten file another key."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)
