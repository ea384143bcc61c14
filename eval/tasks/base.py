"""What a task is: items to ask, a score for each answer, metrics from summed counts.

A task knows its data files and its official scoring rule; it knows nothing of models, engines,
policies or of how answers were obtained. Adding one: see `vllm_flow.eval.tasks`.
"""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
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
    """Everything scoring needs; JSON-serialisable. `image_id`, where it is there, names the picture for all
    questions about it (see `picture_of`)."""
    group: str = ""
    """A part of the task that is also scored by itself, e.g. POPE's category."""

    @property
    def picture_of(self) -> str:
        """Names the picture: the same for all questions about it, also where a file embeds it in every row.

        It is what was sampled independently, and so what statistics take as their unit. An item without a
        picture stands for itself.
        """
        named = self.truth.get("image_id") or self.truth.get("image")
        if self.image is None or not named:
            return self.image or f"item {self.id}"
        return str(named)


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
    bundle: tuple[str, int] = ("", 1)
    """With which others this answer is scored (`Task.together`), and how many they are with it."""


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
    full_marks: Mapping[str, float] = MappingProxyType({})
    """Metrics that the benchmark reports in points: what a share of 1 is worth there, e.g. 2000."""
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

    def bundle(self, item: Item) -> tuple[str, int]:
        """Which items are scored together: a name and their number. A sample takes all of them or none."""
        return (item.id, 1)

    def together(self, scored: Iterable[Scored]) -> list[Scored]:
        """The answers with the counts of bundles added, each to one answer of its bundle.

        For benchmarks with a score that no answer has by itself (MME: both questions about a picture right).
        Called with the answers that are summed; a bundle that is not whole among them counts nothing.
        """
        return list(scored)

    def asked_as(self, style: str) -> Task:
        """The task with the prompts of another family (`vllm_flow.eval.tasks.prompts`); itself where the
        family's authors published none for it."""
        return replace(self, prompts=style) if hasattr(self, "prompts") else self  # type: ignore[type-var]


def whole_bundles(scored: Iterable[Scored]) -> list[list[Scored]]:
    """The bundles of which every answer is there, in the order in which they begin."""
    found: dict[tuple[str, int], list[Scored]] = {}
    for one in scored:
        found.setdefault(one.bundle, []).append(one)
    return [parts for (_, size), parts in found.items() if len(parts) == size]


def with_counts(scored: Iterable[Scored], more: Mapping[str, Mapping[str, float]]) -> list[Scored]:
    """Answers with further counts: id -> counts."""
    return [
        replace(one, counts={**one.counts, **more[one.id]}) if one.id in more else one
        for one in scored
    ]


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


def grouped_accuracy(totals: Totals, groups: Iterable[str]) -> Metrics:
    """Accuracy over all and per group, from the counts `right_{group}` and `asked_{group}`."""
    parts = {name: counts_of(totals, f"right_{name}", f"asked_{name}") for name in groups}
    right, asked = (sum(part[side] for part in parts.values()) for side in (0, 1))
    metrics: Metrics = {"accuracy": ratio(right, asked)}
    return metrics | {f"accuracy_{name}": ratio(*part) for name, part in parts.items()}


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
    name = f"{path}, {length} bytes from {start}"
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
