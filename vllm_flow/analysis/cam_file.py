"""What the analysis writes and draws again: a CAM as one NPZ file. (numpy only)"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_flow.analysis.maps import entropy, mass_inside
from vllm_flow.counts import counted
from vllm_flow.outputs import write_whole


@dataclass(frozen=True)
class CamRecord:
    """The heat maps of one answer, with all that is needed to draw them."""

    model: str
    prompt: str
    answer_tokens: tuple[str, ...]
    answer_ids: tuple[int, ...]
    explained: tuple[int, ...]
    """Which of the answer's tokens z sums over."""
    layers: tuple[int, ...]
    heat: NDArray[np.float32]
    """[layers, rows, columns], mean over the copies, not normalised."""
    view: NDArray[np.uint8]
    """[H, W, 3]: the picture as the model sees it."""
    hook: str
    samples: int
    sigma: float
    seed: int
    coverage: NDArray[np.float64] | None = None
    """[rows, columns] share of each patch inside the box, where one was given."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of `view`."""
    part: str = ""
    """`whole` for the picture whole, where the model sees it beside finer tiles; empty for these."""

    @property
    def answer(self) -> str:
        return "".join(self.answer_tokens).strip()

    @property
    def word(self) -> str:
        """The explained tokens as text."""
        return "".join(self.answer_tokens[token] for token in self.explained).strip()

    def save(self, path: Path) -> Path:
        """Write an NPZ file without pickled objects; missing fields are left out."""
        fields = {
            name: np.asarray(value) for name, value in vars(self).items() if value is not None
        }
        return write_whole(path, lambda draft: np.savez_compressed(draft, **fields))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> CamRecord:
        """Read it again; ValueError that names the file where it is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                data = dict(file)
        # What NumPy, zipfile and zlib raise for damaged files has no common name.
        except Exception as error:
            why = f"it is damaged: {error}" if zipfile.is_zipfile(path) else "it is no NPZ file"
            raise ValueError(f"{path} is no CAM ({why}); `vllm-flow cam` writes them") from None
        if missing := {field.name for field in fields(cls) if field.default is MISSING} - set(data):
            raise ValueError(f"{path} is no CAM: it lacks {', '.join(sorted(missing))}")
        try:
            record = cls(
                model=str(data["model"]),
                prompt=str(data["prompt"]),
                answer_tokens=tuple(str(token) for token in data["answer_tokens"].tolist()),
                answer_ids=tuple(int(token) for token in data["answer_ids"].tolist()),
                explained=tuple(int(token) for token in data["explained"].tolist()),
                layers=tuple(int(layer) for layer in data["layers"].tolist()),
                heat=data["heat"].astype(np.float32),
                view=data["view"].astype(np.uint8),
                hook=str(data["hook"]),
                samples=int(data["samples"]),
                sigma=float(data["sigma"]),
                seed=int(data["seed"]),
                coverage=data["coverage"].astype(float) if "coverage" in data else None,
                box=tuple(int(edge) for edge in data["box"].tolist()) if "box" in data else None,  # type: ignore[arg-type]
                part=str(data.get("part", "")),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is no CAM ({error})") from None
        if wrong := record.wrong():
            raise ValueError(f"{path} is no CAM: {wrong}")
        return record

    def wrong(self) -> str | None:
        """What does not fit together; None if all does."""
        shapes = self.heat.ndim == 3 and len(self.heat) == len(self.layers) > 0 and self.heat.size
        if not shapes:
            return (
                f"its heat has the shape {self.heat.shape} for {counted(len(self.layers), 'layer')}"
            )
        if self.view.ndim != 3 or self.view.shape[2] != 3 or not self.view.size:
            return f"its picture has the shape {self.view.shape}"
        if not np.isfinite(self.heat).all():
            return "its heat is not finite"
        if any(not 0 <= token < len(self.answer_tokens) for token in self.explained):
            return "it explains tokens that the answer has not"
        if self.coverage is not None and self.coverage.shape != self.heat.shape[1:]:
            return "its box's share is of another grid"
        if self.coverage is not None and not np.isfinite(self.coverage).all():
            return "its box's share is not finite"
        if self.box is not None and len(self.box) != 4:
            return "its box has not four edges"
        return None

    def rows(self) -> list[dict[str, float | int]]:
        """One row of numbers per layer; NaN where a layer has no heat."""
        found = []
        for layer, heat in zip(self.layers, self.heat, strict=True):
            row, column = np.unravel_index(int(np.argmax(heat)), heat.shape)
            numbers: dict[str, float | int] = {
                "layer": layer,
                "peak": float(heat.max()),
                "peak_row": int(row),
                "peak_column": int(column),
                "entropy": entropy(heat),
            }
            if self.coverage is not None:
                numbers["inside_box"] = mass_inside(heat, self.coverage)
                numbers["inside_box_by_chance"] = float(self.coverage.mean())
            found.append(numbers)
        return found


def write_rows(rows: Sequence[Mapping[str, float | int | str]], path: Path) -> Path:
    """Rows as CSV, six significant digits."""

    def write(draft: Path) -> None:
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {
                        key: f"{value:.6g}" if isinstance(value, float) else value
                        for key, value in row.items()
                    }
                )

    return write_whole(path, write)
