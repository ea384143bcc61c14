"""What the analysis writes and draws again: a CAM as one NPZ file. (numpy only)"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_flow.analysis.maps import entropy, mass_inside


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
    """[layers, grid, grid], mean over the copies, not normalised."""
    view: NDArray[np.uint8]
    """[H, W, 3]: the picture as the model sees it."""
    hook: str
    samples: int
    sigma: float
    seed: int
    coverage: NDArray[np.float64] | None = None
    """[grid, grid] share of each patch inside the box, where one was given."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of `view`."""

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
        np.savez_compressed(path, **fields)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, path: Path) -> CamRecord:
        """Read it again; ValueError where the file is something else."""
        with np.load(path, allow_pickle=False) as file:
            data = dict(file)
        if missing := {"heat", "layers", "view", "answer_tokens"} - set(data):
            raise ValueError(f"{path} is no CAM: it lacks {', '.join(sorted(missing))}")
        return cls(
            model=str(data["model"]),
            prompt=str(data["prompt"]),
            answer_tokens=tuple(data["answer_tokens"].tolist()),
            answer_ids=tuple(data["answer_ids"].tolist()),
            explained=tuple(data["explained"].tolist()),
            layers=tuple(data["layers"].tolist()),
            heat=data["heat"],
            view=data["view"],
            hook=str(data["hook"]),
            samples=int(data["samples"]),
            sigma=float(data["sigma"]),
            seed=int(data["seed"]),
            coverage=data.get("coverage"),
            box=tuple(data["box"].tolist()) if "box" in data else None,
        )

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
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: f"{value:.6g}" if isinstance(value, float) else value
                    for key, value in row.items()
                }
            )
    return path
