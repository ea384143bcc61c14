"""The demo's figure: accuracy, prefill time and KV blocks against the cliff. (matplotlib only)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_flow.showcase.records import SPLIT_TITLES, Results

# Okabe and Ito's palette, told apart under the common kinds of colour blindness; markers differ.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")
IDEAL = "#555555"


def draw(results: Results, directory: Path) -> list[Path]:
    """Write `curve.png` and `curve.svg` into the directory; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.hashsalt": "vllm-flow",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.8), layout="constrained")
        draw_accuracy(axes[0], results)
        draw_speed(axes[1], results)
        draw_blocks(axes[2], results)
        for axis in axes:
            axis.set_xlabel("cliff: layers that see the image")
            axis.set_xlim(-0.6, results.engine.num_layers + 0.6)
            axis.xaxis.get_major_locator().set_params(integer=True)
            # Below the axes, where it can hide no point.
            axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(-0.02, -0.14))
        paths = [directory / "curve.png", directory / "curve.svg"]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
        plt.close(figure)
    return paths


def draw_accuracy(axis: Any, results: Results) -> None:
    """Share of right answers per split; the headline split with its 95 % band."""
    cliffs = [row.cliff for row in results.rows]
    for number, split in enumerate(results.splits):
        scores = [row.scores[split] for row in results.rows]
        values = [100 * score.accuracy.value for score in scores]
        label = f"{SPLIT_TITLES.get(split, split)} ({scores[0].total})"
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        wide = number == 0
        if wide:
            low = [100 * score.accuracy.low for score in scores]
            high = [100 * score.accuracy.high for score in scores]
            axis.fill_between(cliffs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(
            cliffs,
            values,
            color=colour,
            marker=marker,
            markersize=5 if wide else 4,
            linewidth=2 if wide else 1.2,
            label=label,
            zorder=3 if wide else 2,
        )
    axis.axhline(50, color=IDEAL, linewidth=1, linestyle=":")
    axis.annotate(
        "guessing", (results.engine.num_layers, 50), (0, 3), textcoords="offset points",
        ha="right", fontsize=8, color=IDEAL,
    )  # fmt: skip
    axis.set_ylim(None, 101)
    axis.set_ylabel("right answers, %")
    axis.set_title("Accuracy (band: 95 % interval)", loc="left", fontweight="bold")


def draw_speed(axis: Any, results: Results) -> None:
    """Prefill speed-up with the range over rounds, beside the row-count ideal."""
    cliffs = [row.cliff for row in results.rows]
    axis.plot(
        cliffs,
        [row.speedup_ideal for row in results.rows],
        color=IDEAL,
        linestyle="--",
        label="ideal: rows × layers saved",
    )
    timed = [row for row in results.rows if row.speedup is not None]
    if timed:
        middle = [row.speedup.median for row in timed]
        axis.errorbar(
            [row.cliff for row in timed],
            middle,
            yerr=[
                [row.speedup.median - row.speedup.low for row in timed],
                [row.speedup.high - row.speedup.median for row in timed],
            ],
            color=COLOURS[0],
            marker="o",
            markersize=5,
            capsize=2,
            linewidth=2,
            elinewidth=1,
            label=f"measured: median and range of {timed[0].speedup.count} rounds",
        )
    axis.axhline(1, color=IDEAL, linewidth=1, linestyle=":")
    axis.set_ylim(0, None)
    axis.set_ylabel("times faster than the baseline")
    axis.set_title("Prefill speed-up", loc="left", fontweight="bold")


def draw_blocks(axis: Any, results: Results) -> None:
    """KV blocks per request, measured on the prediction."""
    cliffs = [row.cliff for row in results.rows]
    groups, size = len(results.engine.group_starts), results.engine.block_size
    axis.plot(
        cliffs,
        [row.blocks_predicted for row in results.rows],
        color=IDEAL,
        linestyle="--",
        label=f"predicted: {groups} storage groups, {size} tokens a block",
    )
    axis.plot(
        cliffs,
        [row.blocks for row in results.rows],
        color=COLOURS[0],
        marker="o",
        markersize=5,
        linestyle="none",
        label="measured",
    )
    axis.set_ylim(0, None)
    axis.set_ylabel("KV blocks per request")
    axis.set_title("Memory: KV-cache blocks", loc="left", fontweight="bold")
