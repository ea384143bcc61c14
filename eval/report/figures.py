"""The report's figures: score, paired difference and cost against the cliff. (matplotlib only)

Every figure is written as PNG and SVG; the numbers are in the CSV files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.eval.report.results import Options, PolicyResult, Summary, TaskResult
from vllm_flow.eval.report.text import is_share, metric_title, task_title
from vllm_flow.style import AMBER, BLACK, BLUE, GREEN, PINK, QUIET, SKY, VERMILION, house, save

OTHER = (PINK, AMBER, SKY, BLACK)
"""Kinds of policies that are neither cliffs nor downsampling, in order of appearance."""

COLUMNS = 3


def draw_all(summary: Summary, directory: Path, options: Options) -> dict[str, Path]:
    """Write every figure that the run has points for; name -> SVG (a PNG lies beside it)."""
    tasks = [t for t in summary.tasks if any(r.answered for r in t.policies)]
    layers = summary.num_layers
    swept = [t for t in tasks if layers and len(on_axis(t, layers)) > 1]
    compared = [t for t in swept if t.cliff is not None]
    priced = [t for t in tasks if len(costs(summary, t)) > 1]
    plans: list[tuple[str, list[TaskResult], Callable[[Any, TaskResult], None]]] = [
        ("scores", swept, lambda axis, task: scores(axis, task, layers or 0)),
        ("differences", compared, lambda axis, task: differences(axis, task, layers or 0, options)),
        ("tradeoff", priced, lambda axis, task: tradeoff(axis, task, summary)),
    ]
    written = {}
    with house(axes_titlesize=11) as plt:
        for name, chosen, draw in plans:
            if chosen:
                figure = panels(plt, chosen, draw)
                _, written[name] = save(plt, figure, directory / name, transparent=True)
        if layers and len(saved_on_axis(summary)) > 1:
            figure, axis = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
            saved(axis, summary)
            _, written["savings"] = save(plt, figure, directory / "savings", transparent=True)
    return written


def panels(plt: Any, tasks: Sequence[TaskResult], draw: Callable[[Any, TaskResult], None]) -> Any:
    """One panel per task, and one legend below them that names each thing once."""
    columns = min(len(tasks), COLUMNS if len(tasks) != 4 else 2)
    rows = -(-len(tasks) // columns)
    width = max((4.5 if columns < 3 else 4.0) * columns, 6.4)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, 2.9 * rows + 0.6), squeeze=False, layout="constrained"
    )
    labels: dict[str, Any] = {}
    for task, axis in zip(tasks, axes.flat, strict=False):
        draw(axis, task)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside lower left",
        ncols=max(1, int(width / 3)),
        fontsize=9,
    )
    return figure


def on_axis(task: TaskResult, layers: int) -> list[tuple[int, PolicyResult]]:
    """The results that have a place on the layer axis, baseline included, by layer."""
    placed = [(r.policy.layer(layers), r) for r in task.policies if task.headline in r.values]
    return sorted(((x, r) for x, r in placed if x is not None), key=lambda pair: pair[0])


def _scale(task: TaskResult) -> float:
    return 100.0 if is_share(task, task.headline) else 1.0


def _headed(axis: Any, task: TaskResult, what: str) -> None:
    direction = "" if task.higher_is_better else ": lower is better"
    axis.set_title(task_title(task.name) + direction)
    percent = ", %" if _scale(task) == 100 and "difference" not in what else ""
    axis.set_ylabel(f"{metric_title(task.headline)}{what}{percent}")


def _layer_axis(axis: Any, layers: int) -> None:
    axis.set_xlabel("cliff: layers that see the image")
    axis.set_xlim(-0.02 * layers, 1.02 * layers)
    axis.xaxis.get_major_locator().set_params(integer=True)


def scores(axis: Any, task: TaskResult, layers: int) -> None:
    """The headline metric against the cliff, with its interval; baseline, floor, downsampling."""
    scale, points = _scale(task), on_axis(task, layers)
    x = [layer for layer, _ in points]
    values = [r.values[task.headline] for _, r in points]
    axis.fill_between(
        x,
        [scale * v.low for v in values],
        [scale * v.high for v in values],
        color=BLUE,
        alpha=0.15,
        linewidth=0,
        label="95 % interval",
    )
    axis.plot(x, [scale * v.value for v in values], "-o", color=BLUE, ms=4, lw=2, label="cliff")
    if task.baseline:
        axis.axhline(
            scale * task.baseline.values[task.headline].value,
            color=QUIET, ls="--", lw=1.2, label="baseline", zorder=1,
        )  # fmt: skip
    floor = next((r for _, r in points if r.policy.kind == "text-only"), None)
    if floor:
        axis.axhline(
            scale * floor.values[task.headline].value,
            color=QUIET, ls=":", lw=1.4, label="text only", zorder=1,
        )  # fmt: skip
    reduced = [
        (r.policy.cliff, r.values[task.headline])
        for r in task.policies
        if r.policy.kind == "downsample" and r.policy.cliff is not None and r.values
    ]
    if reduced:
        axis.errorbar(
            [c for c, _ in reduced],
            [scale * v.value for _, v in reduced],
            yerr=[
                [scale * (v.value - v.low) for _, v in reduced],
                [scale * (v.high - v.value) for _, v in reduced],
            ],
            fmt="s", ms=5, mfc="white", color=VERMILION, elinewidth=1, capsize=2,
            label="fewer image tokens, prefill budget of that cliff",
        )  # fmt: skip
    _mark_cliff(axis, task)
    _layer_axis(axis, layers)
    if task.cliff is not None and task.cliff.too_few:
        # Below the panel: within it, wherever that is, some curve or its interval passes.
        axis.set_xlabel(f"{axis.get_xlabel()}\n(too few questions to show one)")
    _headed(axis, task, "")


def _mark_cliff(axis: Any, task: TaskResult) -> None:
    cliff = task.cliff
    if cliff is None:
        return
    if cliff.shown is not None:
        label = "from here on no larger loss: shown"
        axis.axvline(cliff.shown, color=GREEN, lw=1.8, label=label, zorder=1)
    # Not `cliff.found`: with few questions a visible loss is no finding, and the line would cross it.
    if cliff.seen is not None and cliff.seen != cliff.shown:
        label = "from here on no larger loss seen or found"
        axis.axvline(cliff.seen, color=GREEN, lw=1.2, ls="-.", label=label, zorder=1)


def differences(axis: Any, task: TaskResult, layers: int, options: Options) -> None:
    """Paired differences to the baseline; filled where the corrected test finds one."""
    scale = _scale(task)
    tolerance = scale * options.tolerance
    axis.axhspan(-tolerance, tolerance, color=GREEN, alpha=0.12, lw=0, label="tolerance")
    axis.axhline(0, color=QUIET, lw=1.2, ls="--", label="baseline")
    found = [
        (layer, r.against[task.headline])
        for layer, r in on_axis(task, layers)
        if task.headline in r.against
    ]
    for sure in (False, True):
        group = [(x, c) for x, c in found if (c.p_corrected < options.level) == sure]
        if not group:
            continue
        middle = [scale * c.comparison.difference.value for _, c in group]
        axis.errorbar(
            [x for x, _ in group],
            middle,
            yerr=[
                [m - scale * c.comparison.difference.low for m, (_, c) in zip(middle, group, strict=True)],
                [scale * c.comparison.difference.high - m for m, (_, c) in zip(middle, group, strict=True)],
            ],
            fmt="o", ms=5, color=BLUE, mfc=BLUE if sure else "white", elinewidth=1.2, capsize=2,
            label="difference found (Holm)" if sure else "no difference found",
        )  # fmt: skip
    _mark_cliff(axis, task)
    _layer_axis(axis, layers)
    _headed(axis, task, ", difference" + (" in points" if scale == 100 else ""))


def costs(summary: Summary, task: TaskResult) -> list[tuple[float, PolicyResult]]:
    """Share of the baseline's prefill rows -> result, ascending."""
    shares = {s.policy: s.prefill_share for s in summary.task_savings.get(task.name, ())}
    pairs = [(shares.get(r.policy.name), r) for r in task.policies if task.headline in r.values]
    return sorted(((x, r) for x, r in pairs if x is not None), key=lambda pair: pair[0])


def tradeoff(axis: Any, task: TaskResult, summary: Summary) -> None:
    """The headline metric against what it costs in prefill: every kind of policy on one axis."""
    scale, points = _scale(task), costs(summary, task)
    kinds = list(dict.fromkeys(r.policy.kind for r in task.policies))
    others = [k for k in kinds if k not in ("baseline", "cliff", "text-only", "downsample")]
    groups: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("cliff", ("cliff", "text-only", "baseline"), {"fmt": "-o", "color": BLUE, "ms": 4}),
        ("fewer image tokens", ("downsample",), {"fmt": ":s", "color": VERMILION, "mfc": "white", "ms": 5}),
    ]  # fmt: skip
    groups += [
        (kind, (kind,), {"fmt": "D", "color": OTHER[n % len(OTHER)], "ms": 5})
        for n, kind in enumerate(others)
    ]
    for label, wanted, look in groups:
        group = [(x, r.values[task.headline]) for x, r in points if r.policy.kind in wanted]
        if group:
            axis.errorbar(
                [100 * x for x, _ in group],
                [scale * v.value for _, v in group],
                yerr=[
                    [scale * (v.value - v.low) for _, v in group],
                    [scale * (v.high - v.value) for _, v in group],
                ],
                elinewidth=0.8, capsize=0, lw=1.6, label=label, **look,
            )  # fmt: skip
    if task.baseline:
        axis.axhline(
            scale * task.baseline.values[task.headline].value,
            color=QUIET, ls="--", lw=1.2, label="baseline", zorder=1,
        )  # fmt: skip
    axis.set_xlabel("prefill rows computed, % of the baseline")
    axis.set_xlim(None, 103)
    _headed(axis, task, "")


def saved_on_axis(summary: Summary) -> list[tuple[int, Any]]:
    """(layer, saving) of the policies on the layer axis that have a cost, by layer."""
    policies = {p.name: p for p in summary.policies}
    placed = [(policies[s.policy].layer(summary.num_layers), s) for s in summary.savings]
    return sorted(
        ((x, s) for x, s in placed if x is not None and (s.prefill_share or s.kv_share)),
        key=lambda pair: pair[0],
    )


def saved(axis: Any, summary: Summary) -> None:
    """Prefill rows and KV blocks that are left, against the cliff, over all tasks."""
    points = saved_on_axis(summary)
    for label, name, look in (
        ("prefill rows", "prefill_share", {"color": BLUE, "marker": "o"}),
        ("KV-cache blocks", "kv_share", {"color": VERMILION, "marker": "s", "ls": "--"}),
    ):
        group = [(x, getattr(s, name)) for x, s in points if getattr(s, name) is not None]
        if group:
            axis.plot(
                [x for x, _ in group],
                [100 * y for _, y in group],
                ms=4,
                lw=1.8,
                label=label,
                **look,
            )
    axis.set_ylim(0, 104)
    axis.set_ylabel("left, % of the baseline")
    axis.set_title("What is still computed and stored")
    axis.legend(fontsize=9, loc="lower right")
    _layer_axis(axis, summary.num_layers or 1)
