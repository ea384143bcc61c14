"""The report's figures of score against cost: all methods on one axis, controls told apart. (matplotlib only)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.eval.report.cost import BASELINE, CLIFF, DOWNSAMPLE, Point
from vllm_flow.eval.report.figures import panels
from vllm_flow.eval.report.results import TaskResult
from vllm_flow.eval.report.text import is_share, metric_title, task_title
from vllm_flow.style import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    PINK,
    QUIET,
    SKY,
    VERMILION,
    house,
    save,
)

FIXED: Mapping[str, dict[str, Any]] = {
    CLIFF: {"color": BLUE, "marker": "o"},
    DOWNSAMPLE: {"color": QUIET, "marker": "s"},
    "uniform": {"color": QUIET, "marker": "v"},
    "random": {"color": QUIET, "marker": "X"},
}
"""Methods that look the same in every report; the others are given looks in order of appearance."""
OTHERS = tuple(
    {"color": colour, "marker": marker}
    for colour, marker in zip((VERMILION, GREEN, PINK, AMBER, SKY, BLACK), "D^Ph<>", strict=True)
)
APART = 0.006
"""Between methods at one number of tokens, of the axis, so that their intervals can be told apart."""
MOST_JOINED = 40
"""Policies of one method up to which every point is marked."""
Place = Callable[[Point], "tuple[float, float, float] | None"]
"""Where a point stands on the axis of cost, with the limits there."""


def draw(
    tasks: Sequence[TaskResult], found: Mapping[str, Sequence[Point]], directory: Path
) -> dict[str, Path]:
    """Write `cost` and, where prefills were timed, `time`; name -> SVG (a PNG lies beside it)."""
    looks = looks_of(found)
    axes: tuple[tuple[str, Place, str], ...] = (
        ("cost", _tokens, "image tokens per layer, on average"),
        ("time", _time, "prefill time, % of the baseline's"),
    )
    written = {}
    with house(axes_titlesize=11) as plt:
        for name, place, label in axes:
            chosen = [t for t in tasks if len(methods(found.get(t.name, ()), place)) > 1]
            if not chosen:
                continue

            def panel(
                axis: Any, task: TaskResult, place: Place = place, label: str = label
            ) -> None:
                curves(axis, task, found[task.name], place, looks)
                axis.set_xlabel(label)

            figure = panels(plt, chosen, panel)
            _, written[name] = save(plt, figure, directory / name, transparent=True)
    return written


def looks_of(found: Mapping[str, Sequence[Point]]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, the same in all panels."""
    names = dict.fromkeys(point.method.name for one in found.values() for point in one)
    looks, free = dict(FIXED), iter(OTHERS * (1 + len(names)))
    for name in names:
        if name not in looks and name != BASELINE:
            looks[name] = next(free)
    return looks


def methods(found: Sequence[Point], place: Place) -> list[str]:
    """Methods that have a place on an axis, in the order of the legend: controls last."""
    placed = {p.method for p in found if p.method.name != BASELINE and place(p) is not None}
    return [m.name for m in sorted(placed, key=lambda m: (m.control, m.name != CLIFF, m.name))]


def curves(
    axis: Any,
    task: TaskResult,
    found: Sequence[Point],
    place: Place,
    looks: Mapping[str, dict[str, Any]],
) -> None:
    """Every method's score with its interval against a cost; of several seeds, their range as well."""
    scale = 100.0 if is_share(task, task.headline) else 1.0
    names = methods(found, place)
    ends = [at[0] for point in found if (at := place(point)) is not None]
    apart = APART * max(ends, default=0.0) if place is _tokens else 0.0
    for index, name in enumerate(names):
        own = [(at, p) for p in found if p.method.name == name and (at := place(p)) is not None]
        own.sort(key=lambda pair: pair[0][0])
        control = own[0][1].method.control
        aside = (index - (len(names) - 1) / 2) * apart
        x = [at[0] + aside for at, _ in own]
        y = [scale * p.value.value for _, p in own]
        look = dict(looks[name])
        marker = look.pop("marker")
        axis.errorbar(
            x,
            y,
            xerr=[[at[0] - at[1] for at, _ in own], [at[2] - at[0] for at, _ in own]],
            yerr=[
                [scale * (p.value.value - p.value.low) for _, p in own],
                [scale * (p.value.high - p.value.value) for _, p in own],
            ],
            fmt=marker if len(own) < MOST_JOINED else ",",
            ls=":" if control else "-",
            mfc="white" if control else None,
            ms=5, lw=1.3, elinewidth=0.7, capsize=0, alpha=0.9,
            label=f"control: {name}" if control else name,
            **look,
        )  # fmt: skip
        for at, point in own:
            if point.seeds:
                axis.plot(
                    [at[0] + aside] * 2, [scale * end for end in point.seeds], lw=5, alpha=0.35, **look,
                    solid_capstyle="butt",
                )  # fmt: skip
    if task.baseline:
        axis.axhline(
            scale * task.baseline.values[task.headline].value,
            color=QUIET, ls="--", lw=1.0, label="baseline", zorder=1,
        )  # fmt: skip
    # A method that is drawn aside may stand left of zero; what costs nothing is seen, too.
    axis.set_xlim(left=-(len(names) / 2 + 1) * apart)
    better = "" if task.higher_is_better else ": lower is better"
    axis.set_title(task_title(task.name) + better)
    axis.set_ylabel(metric_title(task.headline) + (", %" if scale == 100 else ""))


def _tokens(point: Point) -> tuple[float, float, float] | None:
    return None if point.tokens is None else (point.tokens,) * 3


def _time(point: Point) -> tuple[float, float, float] | None:
    times = point.times
    return None if times is None else (100 * times.ratio, 100 * times.low, 100 * times.high)
