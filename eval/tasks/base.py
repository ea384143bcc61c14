"""What a task is: items to ask, a score for each answer, metrics from summed counts.

A task knows its data files and its official scoring rule; it knows nothing of models, engines,
policies or of how answers were obtained. Adding one: see `vllm_flow.eval.tasks`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

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
    """A file's path, or a cell of a parquet file as `parquet_image` names it; `load_image` opens both.
    The file need not exist when items are read."""
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
    unclear: bool = False
    """The rule found nothing in the answer that it looks for; `Task.unclear` says what follows."""


class Task(ABC):
    """A benchmark. Implementations are frozen dataclasses whose fields are the task's options.

    Pictures are read as vLLM's server reads them, so that an evaluation sees what is served. The official
    scripts (LLaVA's, OPERA's) open them with PIL's `convert("RGB")`: sideways where only EXIF data says
    how to turn them, and a transparent pixel in whatever colour is stored under it. `load_image(...,
    "stored")`, on the command line `--image-reading stored`, reads as they do.
    """

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
    unclear: str = ""
    """What to say of `Scored.unclear` answers, after "6 of 6 answers": how the rule takes them."""
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
        """Score an answer.

        The official scripts strip a model's output before they record it; whoever records answers does
        that. The rules here take the recorded text as it is, white space included.
        """

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


def counts_of(totals: Totals, *names: str) -> list[Any]:
    """Counts by name, zero for those that no item has; all of the totals' shape."""
    zero = 0.0 * next(iter(totals.values()), 0.0)
    return [totals.get(name, zero) for name in names]


def ratio(numerator: Any, denominator: Any) -> Any:
    """`numerator / denominator`, elementwise for arrays; 0 where the denominator is 0."""
    top, bottom = np.broadcast_arrays(
        np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    )
    result = np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0)
    return result if result.ndim else float(result)


_CELL = "parquet://"
"""What a reference to a parquet cell begins with. No path can: `str(Path(...))` has no `//` but at its start."""
_PARQUET = re.compile(_CELL + r"(?P<file>.+)#row=(?P<row>[0-9]+)&column=(?P<column>.+)", re.DOTALL)


def parquet_image(path: Path, row: int, column: str = "image") -> str:
    """How an `Item` names an image that is embedded in a parquet file."""
    return f"{_CELL}{path}#row={row}&column={column}"


def load_image(image: str, reading: str = "server", background: Colour = WHITE) -> Image:
    """Open an item's image as RGB.

    Args:
        reading: `server`, as vLLM's server reads it, or `stored`, as the benchmarks' official scripts
            do (see `Task`).
        background: what the server puts behind transparent pixels.

    Raises:
        PictureError: it cannot be had; says why.
    """
    place = _PARQUET.fullmatch(image)
    if place is None:
        data, name = read_bytes(image), image
    else:
        data, name = _embedded(Path(place["file"]), int(place["row"]), place["column"])
    if reading == "stored":
        return decode_as_stored(data, name)
    return decode(data, name, background)


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
                raise PictureError(f"{path}: {start} rows, so no row {row}; was it replaced?")
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
