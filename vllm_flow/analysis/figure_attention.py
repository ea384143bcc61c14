"""The paper's Figure 2: attention mass by layer (A), and by answer token and layer (B)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_flow.analysis.columns import read_columns
from vllm_flow.style import MASS_MAP, SPAN_COLOURS, SPAN_MARKERS, SPANS, house, save


@dataclass(frozen=True)
class MassByLayer:
    """Mean masses, each request counting once."""

    layers: tuple[int, ...]
    mean: NDArray[np.float64]
    """[layers, 4]."""
    low: NDArray[np.float64]
    """[layers, 4]: 5th percentile over requests."""
    high: NDArray[np.float64]
    """[layers, 4]: 95th percentile."""
    requests: int


def read_masses(paths: Sequence[Path]) -> Any:
    """Attention-mass Parquet files as one pandas-free dictionary of numpy arrays.

    ValueError that names the file where a column is missing or the masses do not sum to 1.
    """
    import pyarrow as pa

    wanted = {"request_id": "string", "layer": "int64", "token": "int64"}
    wanted |= {name: "float64" for name in SPANS}
    table = pa.concat_tables([read_columns(path, wanted, "attention-mass") for path in paths])
    if not table.num_rows:
        raise ValueError(f"{paths[0]} holds no attention masses")
    found = {name: table[name].to_numpy(zero_copy_only=False) for name in wanted}
    total = sum(found[name].astype(np.float64) for name in SPANS)
    if not np.allclose(total, 1, atol=1e-2):
        worst = int(np.argmax(np.abs(total - 1)))
        raise ValueError(
            f"the masses of request {found['request_id'][worst]}, layer {found['layer'][worst]} sum "
            f"to {total[worst]:.3f}, not to 1"
        )
    return found


def by_layer(masses: dict[str, NDArray[Any]]) -> MassByLayer:
    """Mean over the tokens of a request, then over requests."""
    layers = np.unique(masses["layer"])
    requests = np.unique(masses["request_id"])
    values = np.full((len(requests), len(layers), len(SPANS)), np.nan)
    for r, request in enumerate(requests):
        of_request = masses["request_id"] == request
        for n, layer in enumerate(layers):
            rows = of_request & (masses["layer"] == layer)
            if rows.any():
                values[r, n] = [masses[name][rows].mean() for name in SPANS]
    low, high = np.nanpercentile(values, [5, 95], axis=0)
    return MassByLayer(tuple(layers.tolist()), np.nanmean(values, 0), low, high, len(requests))


def longest(masses: dict[str, NDArray[Any]]) -> str:
    """The request with most answer tokens, the first of them."""
    names, counts = np.unique(masses["request_id"], return_counts=True)
    return str(names[int(np.argmax(counts))])


def draw_attention(
    masses: dict[str, NDArray[Any]],
    stem: Path,
    request: str | None = None,
    words: Sequence[str] | None = None,
) -> list[Path]:
    """Figure 2; B shows one request (the longest answer by default), `words` are its tokens."""
    summary = by_layer(masses)
    request = request or longest(masses)
    with house() as plt:
        figure = plt.figure(figsize=(13.5, 4.9), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35), wspace=0.03)
        draw_mass_by_layer(left.subplots(), summary)
        draw_mass_by_token(right, masses, request, words)
        return save(plt, figure, stem)


def draw_mass_by_layer(axis: Any, summary: MassByLayer) -> None:
    """Panel A: a line per span, band over requests, names at the lines' ends."""
    for number, span in enumerate(SPANS):
        colour = SPAN_COLOURS[span]
        if summary.requests > 1:
            axis.fill_between(
                summary.layers, 100 * summary.low[:, number], 100 * summary.high[:, number],
                color=colour, alpha=0.18, linewidth=0,
            )  # fmt: skip
        axis.plot(
            summary.layers, 100 * summary.mean[:, number], color=colour, linewidth=1.8,
            marker=SPAN_MARKERS[span], markersize=4, label=span,
        )  # fmt: skip
    axis.set_ylim(0, 100)
    axis.set_xlim(summary.layers[0] - 0.5, summary.layers[-1] + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("decoder layer (0-based)")
    axis.set_ylabel("attention mass of the answer, %")
    band = f"; bands: 90 % of {summary.requests} answers" if summary.requests > 1 else ""
    axis.set_title(f"A  What the answer attends to{band}", fontsize=10.5)
    axis.legend(
        ncols=4, loc="upper left", bbox_to_anchor=(-0.02, -0.13), fontsize=9, handletextpad=0.4,
        columnspacing=1.2,
    )  # fmt: skip


def draw_mass_by_token(
    part: Any, masses: dict[str, NDArray[Any]], request: str, words: Sequence[str] | None = None
) -> None:
    """Panel B: answer tokens x layers, one map per span, one scale of colours."""
    rows = masses["request_id"] == request
    layers = np.unique(masses["layer"][rows])
    tokens = np.unique(masses["token"][rows])
    axes = part.subplots(1, len(SPANS), sharey=True)
    image = None
    for axis, span in zip(axes, SPANS, strict=True):
        values = np.full((len(tokens), len(layers)), np.nan)
        at_token = np.searchsorted(tokens, masses["token"][rows])
        at_layer = np.searchsorted(layers, masses["layer"][rows])
        values[at_token, at_layer] = masses[span][rows]
        image = axis.imshow(
            100 * values, aspect="auto", cmap=MASS_MAP, vmin=0, vmax=100, interpolation="nearest",
            extent=(layers[0] - 0.5, layers[-1] + 0.5, len(tokens) - 0.5, -0.5),
        )  # fmt: skip
        axis.set_title(span, fontsize=10, fontweight="normal", color="black")
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        axis.grid(False)
        axis.spines[["left", "bottom"]].set_visible(False)
    step = max(1, -(-len(tokens) // 24))
    shown = range(0, len(tokens), step)
    labels = [words[tokens[n]].strip() or "␣" if words else str(tokens[n]) for n in shown]
    axes[0].set_yticks(list(shown), labels, fontsize=8)
    axes[0].set_ylabel("answer token")
    part.supxlabel("decoder layer (0-based)", fontsize=10)
    part.suptitle(
        "B  The same for one answer, token by token", x=0.02, ha="left", fontsize=10.5,
        fontweight="bold",
    )  # fmt: skip
    bar = part.colorbar(image, ax=list(axes), shrink=0.9, aspect=26, pad=0.015)
    bar.set_label("attention mass, %", fontsize=9)
    bar.outline.set_visible(False)


def mass_rows(summary: MassByLayer) -> list[dict[str, float | int]]:
    """Panel A as rows for a CSV."""
    rows = []
    for n, layer in enumerate(summary.layers):
        row: dict[str, float | int] = {"layer": layer}
        for number, span in enumerate(SPANS):
            row[span] = float(summary.mean[n, number])
            row[f"{span}_low"] = float(summary.low[n, number])
            row[f"{span}_high"] = float(summary.high[n, number])
        rows.append(row)
    return rows
