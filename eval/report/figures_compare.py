"""Figures of runs beside a reference: scores against the cliff, and paired differences. (matplotlib only)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.eval.report.compare import Pair
from vllm_flow.eval.report.comparison import Comparison, titles
from vllm_flow.eval.report.matching import Side
from vllm_flow.eval.report.results import Options, policies_of
from vllm_flow.eval.report.text import metric_title, task_title
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.style import COLOURS, GREEN, MARKERS, QUIET, house, save

COLUMNS = 3
WIDTHS = {1: 6.4, 2: 4.9}
"""Inches of a panel, by their number in a row."""


def draw(compared: Comparison, out: Path, options: Options) -> dict[str, Path]:
    """Write every figure that there are points for; name -> SVG (a PNG lies beside it)."""
    look = {
        side.label: {
            "color": COLOURS[n % len(COLOURS)],
            "marker": MARKERS[n % len(MARKERS)],
        }
        for n, side in enumerate(compared.sides)
    }
    names = titles(compared)
    swept = {task: lines for task in compared.tasks if (lines := curves(compared, task))}
    written = {}
    with house(axes_titlesize=11) as plt:
        if swept:
            figure, axes = _panels(plt, len(swept), 2.9)
            for axis, (task, lines) in zip(axes, swept.items(), strict=False):
                _scores(axis, task, lines, compared, look)
            _legend(figure, axes)
            _, written["scores"] = save(plt, figure, out / "scores", transparent=True)
        most = max(len(compared.of(task)) for task in compared.tasks)
        figure, axes = _panels(plt, len(compared.tasks), 1.2 + 0.24 * most)
        for axis, task in zip(axes, compared.tasks, strict=False):
            _differences(axis, compared.of(task), names, look, options)
        _legend(figure, axes)
        _, written["differences"] = save(plt, figure, out / "differences", transparent=True)
    return written


def curves(compared: Comparison, task: str) -> dict[str, list[tuple[float, Interval]]]:
    """Run's label -> its scores by the place of their policies on the layer axis, where two or more have one.

    Places are layers where all runs have as many, else shares of the layers in percent. Empty unless pairs are of one
    policy each: else the reference has one point.
    """
    if compared.against is not None:
        return {}
    places = {side.label: _places(side, _one_depth(compared)) for side in compared.sides}
    found: dict[str, dict[float, Interval]] = {side.label: {} for side in compared.sides}
    for pair in compared.of(task):
        both = pair.headline.comparison
        for label, policy, value in (
            (compared.reference.label, pair.reference_policy, both.baseline),
            (pair.run, pair.policy, both.treatment),
        ):
            if policy in places[label]:
                found[label].setdefault(places[label][policy], value)
    lines = {label: sorted(points.items()) for label, points in found.items() if len(points) > 1}
    return lines if len(lines) > 1 else {}


def _one_depth(compared: Comparison) -> bool:
    return len({side.meta.get("num_layers") for side in compared.sides}) == 1


def _places(side: Side, one_depth: bool) -> dict[str, float]:
    """The policies of a run that have a place on the layer axis."""
    layers = side.meta.get("num_layers")
    if not layers:
        return {}
    placed = [(p.name, p.layer(layers)) for p in policies_of(side.meta, side.answers)]
    unit = 1.0 if one_depth else 100 / layers
    return {name: layer * unit for name, layer in placed if layer is not None}


def _panels(plt: Any, count: int, height: float) -> tuple[Any, list[Any]]:
    columns = min(count, COLUMNS if count != 4 else 2)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(WIDTHS.get(columns, 4.2) * columns, height * rows + 0.7),
        squeeze=False,
        layout="constrained",
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    labels: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    # Runs' names may be long: as many columns as the figure has room for.
    room = int(figure.get_figwidth() * 11)
    columns = max(1, room // (max(map(len, labels)) + 6))
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower left", ncols=columns, fontsize=9
    )


def _scores(
    axis: Any,
    task: str,
    lines: Mapping[str, Sequence[tuple[float, Interval]]],
    compared: Comparison,
    look: Mapping[str, dict[str, Any]],
) -> None:
    pairs = compared.of(task)
    read = pairs[0].read
    share = all(pair.share(read.headline) for pair in pairs)
    scale = 100.0 if share else 1.0
    for label, points in lines.items():
        x = [place for place, _ in points]
        axis.fill_between(
            x,
            [scale * v.low for _, v in points],
            [scale * v.high for _, v in points],
            color=look[label]["color"], alpha=0.12, linewidth=0,
        )  # fmt: skip
        axis.plot(x, [scale * v.value for _, v in points], ms=4, lw=1.8, label=label, **look[label])
    one = _one_depth(compared)
    axis.set_xlabel("cliff: layers that see the image" + ("" if one else ", % of the model's"))
    axis.set_title(task_title(task) + ("" if read.higher_is_better else ": lower is better"))
    axis.set_ylabel(metric_title(read.headline) + (", %" if share else ""))


def _differences(
    axis: Any,
    pairs: Sequence[Pair],
    names: Mapping[str, str],
    look: Mapping[str, dict[str, Any]],
    options: Options,
) -> None:
    """A row per pair from top to bottom, those of one policy in one row's room."""
    read = pairs[0].read
    share = all(pair.share(read.headline) for pair in pairs)
    scale = 100.0 if share else 1.0
    tolerance = scale * options.tolerance
    axis.axvspan(-tolerance, tolerance, color=GREEN, alpha=0.12, lw=0, label="tolerance")
    axis.axvline(0, color=QUIET, lw=1.2, ls="--", label="reference")
    for row, pair in enumerate(pairs):
        c, own = pair.headline.comparison.difference, look[pair.run]
        sure = pair.headline.p_corrected < options.level
        axis.errorbar(
            scale * c.value,
            row,
            xerr=[[scale * (c.value - c.low)], [scale * (c.high - c.value)]],
            ms=5, fmt=own["marker"], color=own["color"], mfc=own["color"] if sure else "white",
            elinewidth=1.2, capsize=2, label=f"{pair.run}, difference found" if sure else f"{pair.run}, none found",
        )  # fmt: skip
    policies = [pair.policy for pair in pairs]
    # The name of a policy once, beside the first of its rows.
    axis.set_yticks(
        range(len(pairs)),
        ["" if row and policies[row - 1] == p else names[p] for row, p in enumerate(policies)],
        fontsize=9,
    )
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    axis.set_title(
        task_title(pairs[0].task) + ("" if read.higher_is_better else ": lower is better")
    )
    axis.set_xlabel(f"{metric_title(read.headline)}, difference" + (" in points" if share else ""))
