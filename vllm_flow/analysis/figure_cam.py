"""Figures of LLaVA-CAM: overlays by layer (the paper's Figures 3 and 4), and how the heat gathers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vllm_flow.analysis.cam_file import CamRecord
from vllm_flow.analysis.maps import normalised
from vllm_flow.style import COLOURS, QUIET, house, save

WRAP = 8
"""Square panels in a row where one CAM fills the figure."""
HEAT_MAP = "inferno"
SIDE = 1.45
"""Inches per side of a square panel; others have its area."""
BOX = "#56B4E9"
"""Okabe and Ito's sky blue stands out on every colour of the heat."""


def blend(view: NDArray[np.uint8], heat: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The picture in grey under the max-normalised heat: cold patches stay grey, hot ones glow.

    The grid is enlarged bicubically, as is usual; its cells are what was computed.
    """
    height, width = view.shape[:2]
    values = Image.fromarray(normalised(heat).astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grey = np.asarray(Image.fromarray(view).convert("L"), dtype=np.float64)
    return np.rint(glow(grey, np.clip(np.asarray(values), 0, 1))).astype(np.uint8)


def glow(grey: NDArray[np.floating], share: NDArray[np.floating]) -> NDArray[np.float64]:
    """Grey values in 0 ... 255 [...] under heat in 0 ... 1 [...], as RGB [..., 3] in 0 ... 255."""
    import matplotlib

    base = (70 + 0.65 * grey)[..., None]
    colour = matplotlib.colormaps[HEAT_MAP](0.15 + 0.85 * share)[..., :3] * 255
    opacity = np.clip(share * 1.6, 0, 0.85)[..., None]
    mixed: NDArray[np.float64] = base * (1 - opacity) + colour * opacity
    return mixed


def _panel(axis: Any, pixels: NDArray[np.uint8], record: CamRecord) -> None:
    axis.imshow(pixels, interpolation="lanczos")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if record.box is not None:
        from matplotlib.patches import Rectangle

        left, top, right, bottom = record.box
        for colour, width in (("white", 2.4), (BOX, 1.3)):
            axis.add_patch(
                Rectangle(
                    (left - 0.5, top - 0.5), right - left, bottom - top, fill=False,
                    edgecolor=colour, linewidth=width,
                )
            )  # fmt: skip


def _heat_panel(axis: Any, record: CamRecord, index: int) -> None:
    heat = record.heat[index]
    _panel(axis, blend(record.view, heat), record)
    if heat.max() <= 0:
        axis.text(
            0.96, 0.04, "no heat", transform=axis.transAxes, ha="right", va="bottom",
            fontsize=8, color="black", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip


def draw_overlays(records: Sequence[CamRecord], stem: Path, title: str = "") -> list[Path]:
    """Overlays by layer: a row per record, or one record wrapped into several rows.

    ValueError unless all records have the same layers.
    """
    if len({record.layers for record in records}) != 1:
        raise ValueError("records in one figure must have the same layers")
    layers = records[0].layers
    single = len(records) == 1
    tall = [min(max(record.view.shape[0] / record.view.shape[1], 0.25), 4.0) for record in records]
    wide = SIDE / math.sqrt(max(tall))
    wrap = max(1, int(WRAP * SIDE / wide))
    columns = min(wrap, len(layers) + 1) if single else len(layers) + 1
    rows = math.ceil((len(layers) + 1) / columns) if single else len(records)
    heights = [wide * each for each in (tall * rows if single else tall)]
    with house() as plt:
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(
                max(wide * columns, 5.5) + 0.8,
                sum(heights) + (0.24 * rows + 0.55 if single else 0.05 * rows + 0.6),
            ),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, record in enumerate(records):
            for panel in range(len(layers) + 1):
                place = divmod(panel, columns) if single else (row, panel)
                axis = axes[place]
                axis.set_axis_on()
                heading = "picture"
                if panel > 0:
                    _heat_panel(axis, record, panel - 1)
                    heading = f"layer {layers[panel - 1]}"
                else:
                    _panel(axis, record.view, record)
                    if not single:
                        axis.set_ylabel(
                            f"“{record.word}”", rotation=0, ha="right", va="center", fontsize=10,
                            labelpad=6,
                        )  # fmt: skip
                if single or row == 0:
                    axis.set_title(heading, fontsize=9, loc="left", fontweight="normal")
        scale = plt.cm.ScalarMappable(cmap=_bar_colours(), norm=plt.Normalize(0, 1))
        bar = figure.colorbar(scale, ax=axes, shrink=min(1.0, 2 / rows), aspect=18, pad=0.01)
        end = "\n" if sum(heights) < SIDE + 0.2 else " "  # one line is longer than one low row
        bar.set_label(f"heat, share of{end}the layer’s maximum", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        room = int(figure.get_figwidth() * 9)
        heading = textwrap.shorten(title or default_title(records[0]), room, placeholder=" …")
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return save(plt, figure, stem)


def _bar_colours() -> Any:
    """The heat's colours as they come out on a middle grey."""
    from matplotlib.colors import ListedColormap

    steps = np.linspace(0, 1, 64)
    return ListedColormap(glow(np.full(64, 128.0), steps) / 255)


def default_title(record: CamRecord) -> str:
    """What the CAM explains, and of which answer."""
    whole = len(record.explained) == len(record.answer_tokens)
    what = f"“{record.answer}”" if whole else f"“{record.word}” in “{record.answer}”"
    return f"LLaVA-CAM of {what}, on the picture whole" if record.part else f"LLaVA-CAM of {what}"


def draw_convergence(record: CamRecord, stem: Path) -> list[Path]:
    """Entropy of the heat and its mass inside the box, by layer; ValueError without a box."""
    if record.coverage is None:
        raise ValueError("the convergence figure needs a box")
    rows = record.rows()
    layers = list(record.layers)
    with house() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
        parts = (
            ("inside_box", 100.0, "heat inside the box, %", "Where the heat lies",
             100 * float(record.coverage.mean())),
            ("entropy", 1.0, "entropy of the heat (1: even)", "How spread it is", 1.0),
        )  # fmt: skip
        for axis, (key, factor, label, heading, level) in zip(axes, parts, strict=True):
            axis.axhline(level, color=QUIET, linewidth=1, linestyle="--", label="even heat")
            axis.plot(
                layers, [factor * row[key] for row in rows], color=COLOURS[0], marker="o",
                markersize=4, linewidth=1.6,
            )  # fmt: skip
            empty = [
                layer for layer, heat in zip(layers, record.heat, strict=True) if not heat.any()
            ]
            if empty:  # drawn outside the axes, a line without points would leave no room for them
                axis.plot(
                    empty, [0] * len(empty), color=QUIET, marker="x", markersize=5, linestyle="none",
                    clip_on=False, label="no heat in this layer",
                )  # fmt: skip
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncols=2)
            axis.set_xlim(layers[0] - 0.7, layers[-1] + 0.7)
            axis.set_xlabel("decoder layer (0-based)")
            axis.set_ylabel(label)
            axis.set_title(heading)
            axis.set_ylim(0, factor * 1.03)
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(
            textwrap.shorten(default_title(record), 100, placeholder=" …"),
            x=0.01, ha="left", fontsize=11,
        )  # fmt: skip
        return save(plt, figure, stem)
