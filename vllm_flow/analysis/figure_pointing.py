"""How often a CAM's hottest patch is on the object, by layer, beside chance and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flow.style import COLOURS, QUIET, house, save

if TYPE_CHECKING:
    from vllm_flow.analysis.pointing import Row

TITLES = {
    "naming": "The object’s word in a caption",
    "presence": "“Yes” to a question about it",
}


def draw_pointing(by_task: Mapping[str, Sequence[Row]], stem: Path) -> list[Path]:
    """A panel per task; the row of the mean over layers is left out."""
    with house() as plt:
        figure, axes = plt.subplots(
            1, len(by_task), figsize=(6.2 * len(by_task), 4.5), squeeze=False, sharey=True,
            layout="constrained",
        )  # fmt: skip
        for axis, (task, rows) in zip(axes[0], by_task.items(), strict=True):
            _panel(axis, [row for row in rows if row.layer >= 0])
            axis.set_title(TITLES.get(task, task))
        axes[0, 0].set_ylabel("hottest patch inside the box, % of pictures")
        axes[0, 0].set_ylim(0, None)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=3, loc="outside lower left", fontsize=9)
        return save(plt, figure, stem)


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    layers = [row.layer for row in rows]
    chance = 100 * rows[0].target.chance
    axis.axhline(chance, color=QUIET, linewidth=1, linestyle="--")
    axis.text(
        1.01, chance, "chance", transform=axis.get_yaxis_transform(), ha="left", va="center",
        fontsize=8, color=QUIET,
    )  # fmt: skip
    axis.plot(
        layers, [100 * row.other.share for row in rows], color=COLOURS[3], marker="^", markersize=4,
        linewidth=1, label="on another object of the picture",
    )  # fmt: skip
    axis.plot(
        layers, [100 * row.control.share for row in rows], color=COLOURS[1], marker="s",
        markersize=4, linewidth=1, label="control: weights shuffled over channels",
    )  # fmt: skip
    axis.fill_between(
        layers, [100 * row.target.low for row in rows], [100 * row.target.high for row in rows],
        color=COLOURS[0], alpha=0.15, linewidth=0,
    )  # fmt: skip
    axis.plot(
        layers, [100 * row.target.share for row in rows], color=COLOURS[0], marker="o",
        markersize=5, linewidth=2, label="on the object asked about (band: exact 95 % interval)",
    )  # fmt: skip
    axis.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axis.set_xlabel("decoder layer (0-based)")
    axis.xaxis.get_major_locator().set_params(integer=True)
