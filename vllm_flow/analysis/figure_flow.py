"""A diagram after the paper's Figure 1: which spans read which, stage by stage through the decoder.

A ribbon from one span to another, between two columns, is the attention mass with which the rows of
the second read the first in these layers (mean over rows, layers, heads and requests). What a span
reads of itself is not drawn. Attention is where a row looks, not what the answer depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_flow.analysis.columns import read_columns
from vllm_flow.style import QUIET, SPAN_COLOURS, SPANS, house, save

Flow = dict[tuple[int, str, str], float]
"""(layer, reading span, span read) -> mean mass."""

FULL = 0.62
"""Height in lanes of a ribbon of mass 1."""


def read_flow(path: Path) -> Flow:
    """The mean over requests of a flow file; ValueError that names it where a column is missing."""
    wanted = {"layer": "int64", "source": "string", "target": "string", "mass": "float64"}
    table = read_columns(path, wanted, "attention-flow")
    if not table.num_rows:
        raise ValueError(f"{path} holds no attention flow")
    grouped = table.group_by(["layer", "source", "target"]).aggregate([("mass", "mean")])
    return {
        (row["layer"], row["source"], row["target"]): row["mass_mean"]
        for row in grouped.to_pylist()
    }


def stages(layers: Sequence[int], count: int = 6) -> list[list[int]]:
    """Consecutive layers in at most `count` groups of nearly equal size."""
    parts = np.array_split(np.asarray(sorted(layers)), min(count, len(layers)))
    return [part.tolist() for part in parts]


def stage_masses(flow: Flow, groups: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """[stages, reading span, span read]: mean over a stage's layers; 0 where a span has no rows."""
    return np.array(
        [
            [
                [np.mean([flow.get((layer, source, target), 0.0) for layer in group])
                 for target in SPANS]
                for source in SPANS
            ]
            for group in groups
        ]
    )  # fmt: skip


def draw_flow(flow: Flow, stem: Path) -> list[Path]:
    """Write the diagram; return the paths."""
    groups = stages(sorted({layer for layer, _, _ in flow}))
    masses = stage_masses(flow, groups)
    lane = {span: len(SPANS) - 1 - number for number, span in enumerate(SPANS)}
    with house() as plt:
        figure, axis = plt.subplots(figsize=(13.0, 5.2), layout="constrained")
        for stage in range(len(groups)):
            _ribbons(axis, masses[stage], stage, lane)
        for span in SPANS:
            for column in range(len(groups) + 1):
                axis.plot(
                    column, lane[span], marker="o", markersize=11, color=SPAN_COLOURS[span],
                    markeredgecolor="white", markeredgewidth=1.5, zorder=5,
                )  # fmt: skip
            axis.text(
                -0.12, lane[span], span, ha="right", va="center", fontsize=12, fontweight="bold",
                color=SPAN_COLOURS[span] if span != "system" else QUIET,
            )  # fmt: skip
        for stage, group in enumerate(groups):
            name = f"layers {group[0]}–{group[-1]}" if len(group) > 1 else f"layer {group[0]}"
            axis.text(stage + 0.5, -0.42, name, ha="center", va="top", fontsize=9.5, color=QUIET)
        axis.set_xlim(-0.62, len(groups) + 0.75)
        axis.text(
            -0.62, -0.78, "A ribbon is read by the rows at its right end; numbers: attention mass in %, "
            "5 and more. What a span reads of itself is not drawn.",
            ha="left", va="top", fontsize=9, color=QUIET,
        )  # fmt: skip
        axis.set_ylim(-1.0, len(SPANS) - 0.55)
        axis.set_axis_off()
        axis.set_title("Who reads whom: attention between spans, from shallow to deep layers")
        _legend(axis, len(groups))
        return save(plt, figure, stem)


def _ribbons(axis: Any, mass: NDArray[np.float64], stage: int, lane: dict[str, int]) -> None:
    """The ribbons of one stage, thick ones first, with their masses where they are readable."""
    pairs = [
        (mass[i, j], source, target)
        for i, source in enumerate(SPANS)
        for j, target in enumerate(SPANS)
        if j < i and mass[i, j] >= 0.005
    ]
    for value, source, target in sorted(pairs, reverse=True):
        start, end = lane[target], lane[source]
        half = FULL * value / 2
        x = np.linspace(0, 1, 60)
        y = start + (end - start) * (3 * x**2 - 2 * x**3)
        # The system prompt takes what attention has to spare: kept pale, so that the rest shows.
        opacity = 0.28 if target == "system" else 0.75
        axis.fill_between(
            stage + x, y - half, y + half, color=SPAN_COLOURS[target], alpha=opacity, linewidth=0,
            zorder=2 if target == "system" else 3,
        )  # fmt: skip
        if target != "system" and value >= 0.05:
            axis.text(
                stage + 0.5, start + (end - start) * 0.5, f"{100 * value:.0f}", fontsize=8,
                ha="center", va="center", zorder=6,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
            )  # fmt: skip


def _legend(axis: Any, columns: int) -> None:
    """How thick a ribbon of 10 and of 50 % is."""
    x = columns + 0.3
    axis.text(x, 2.55, "mass read", fontsize=9, color=QUIET, ha="left")
    for y, value in ((2.2, 0.5), (1.75, 0.1)):
        axis.fill_between(
            [x, x + 0.18], y - FULL * value / 2, y + FULL * value / 2, color=QUIET, linewidth=0
        )
        axis.text(x + 0.23, y, f"{100 * value:.0f} %", fontsize=9, va="center", color=QUIET)


def flow_rows(flow: Flow) -> list[dict[str, float | int]]:
    """One row per layer: the mass of each pair as `reader<read`."""
    layers = sorted({layer for layer, _, _ in flow})
    pairs = [(s, t) for i, s in enumerate(SPANS) for j, t in enumerate(SPANS) if j <= i]
    return [
        {"layer": layer, **{f"{s}<{t}": flow.get((layer, s, t), float("nan")) for s, t in pairs}}
        for layer in layers
    ]
