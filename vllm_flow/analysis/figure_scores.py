"""The paper's Figure 5: score against cliff, one panel per task, from the scores of `vllm-flow report`."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from vllm_flow.style import COLOURS, MARKERS, house, save

Points = list[tuple[int, float, float, float]]
"""(cliff, score, low, high), by cliff."""

COLUMNS = ("task", "kind", "layer", "metric", "headline", "value", "low", "high")
"""Of those that `vllm-flow report` writes to `scores.csv`."""
KINDS = ("baseline", "cliff", "text-only")
"""Policies that are a cliff: the number of layers, a layer, 0."""


def read_scores(path: Path) -> dict[str, Points]:
    """Task and headline metric -> points, of the policies that are a cliff.

    Raises:
        ValueError: a column is missing, or there is no such policy; names it.
    """
    found: dict[str, Points] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            for row in reader:
                if row["kind"] in KINDS and row["headline"] == "True":
                    found[f"{row['task']}, {row['metric']}"].append(read_point(row))
        except (csv.Error, ValueError) as error:
            where = f"{path}, line {reader.line_num}"
            raise ValueError(f"{where}, is no table of scores: {error}") from None
    if not found:
        raise ValueError(f"{path} has no score of a cliff")
    return {label: sorted(points) for label, points in found.items()}


def read_point(row: dict[str, str | None]) -> tuple[int, float, float, float]:
    """(cliff, score, low, high) of a row; ValueError where they are none."""
    cells = [row[name] or "" for name in ("layer", "value", "low", "high")]
    layer, numbers = int(cells[0]), [float(cell) for cell in cells[1:]]
    if not 0 <= layer < 10**6 or not all(abs(number) < 1e6 for number in numbers):
        raise ValueError(f"{', '.join(cells)[:80]} is no score of a layer")
    return layer, numbers[0], numbers[1], numbers[2]


def score_rows(scores: dict[str, Points]) -> list[dict[str, str | float]]:
    """What is drawn, a row per point."""
    names = ("layer", "score", "low", "high")
    return [
        {"line": line, **dict(zip(names, point, strict=True))}
        for line, points in scores.items()
        for point in points
    ]


def draw_scores(scores: dict[str, Points], stem: Path) -> list[Path]:
    """A panel per line, with its interval: metrics have no common scale, nor a common direction."""
    columns = min(len(scores), 2)
    lines = -(-len(scores) // columns)
    with house() as plt:
        figure, axes = plt.subplots(
            lines, columns, figsize=(1.4 + 4.2 * columns, 0.6 + 2.7 * lines), squeeze=False,
            sharex=True, layout="constrained",
        )  # fmt: skip
        for number, (axis, (line, points)) in enumerate(
            zip(axes.flat, scores.items(), strict=False)
        ):
            cliffs, values, low, high = zip(*points, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            axis.fill_between(cliffs, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(
                cliffs, values, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4.5,
                linewidth=1.8,
            )  # fmt: skip
            axis.set_title(line, fontsize=11)
            axis.set_ylim(-0.04, 1.04)
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes.flat[len(scores) :]:
            axis.set_visible(False)
        figure.supxlabel("cliff: layers that see the image", fontsize=10)
        figure.supylabel("score (band: 95 % interval)", fontsize=10)
        return save(plt, figure, stem)
