"""The paper's Figure 5: score against cliff, one line per task, from an evaluation's CSV."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from vllm_flow.analysis.style import COLOURS, MARKERS, house, save

Points = list[tuple[int, float, float, float]]
"""(cliff, score, low, high), by cliff."""

COLUMNS = ("task", "policy", "cliff", "score", "low", "high")


def read_scores(path: Path) -> dict[str, Points]:
    """Task -> points, of the rows that have a cliff; ValueError that names a missing column."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} is no table of scores: it lacks {', '.join(missing)}")
        found: dict[str, Points] = defaultdict(list)
        for row in reader:
            if row["cliff"]:
                score, low, high = (float(row[name]) for name in ("score", "low", "high"))
                found[row["task"]].append((int(row["cliff"]), score, low, high))
    if not found:
        raise ValueError(f"{path} has no row with a cliff")
    return {task: sorted(points) for task, points in found.items()}


def draw_scores(scores: dict[str, Points], stem: Path) -> list[Path]:
    """One line per task with its interval."""
    with house() as plt:
        figure, axis = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
        for number, (task, points) in enumerate(scores.items()):
            cliffs, values, low, high = zip(*points, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            axis.fill_between(cliffs, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(
                cliffs, values, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4.5,
                linewidth=1.8, label=task,
            )  # fmt: skip
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("cliff: layers that see the image")
        axis.set_ylabel("score (band: 95 % interval)")
        axis.set_title("Score against the cliff")
        axis.legend(fontsize=9, loc="lower right")
        return save(plt, figure, stem)
