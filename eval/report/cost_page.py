"""The report's section on methods at equal cost: from a run to figures, CSV files and what the page shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.report import figures_cost, text
from vllm_flow.eval.report.contests import Budget, contests, sentences
from vllm_flow.eval.report.cost import (
    CLIFF,
    DOWNSAMPLE,
    Point,
    points,
    read_policies,
    times_by_policy,
    tokens_by_policy,
)
from vllm_flow.eval.report.results import Options, Summary, TaskResult
from vllm_flow.eval.report.tables import write_table
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.eval.tasks.base import Item, Task

TIMES = "times.json"
"""What `vllm-flow eval --time` leaves in a run."""
COSTS = (
    "task", "policy", "method", "control", "presets", "image_tokens_per_layer", "prefill_time", "prefill_time_low",
    "prefill_time_high", "value", "low", "high", "lowest_seed", "highest_seed",
    "between_seeds_low", "between_seeds_high",
)  # fmt: skip
CONTESTS = (
    "task", "budget", "one", "other", "one_tokens", "other_tokens", "difference", "low", "high", "p", "p_holm",
    "winner",
)  # fmt: skip


@dataclass(frozen=True)
class EqualCost:
    """Everything the page shows of methods at equal cost; empty where a run compares none."""

    figures: Mapping[str, Path]
    tasks: Sequence[Mapping[str, Any]]
    timed: str
    """How prefills were timed, as a sentence; empty where they were not."""


def equal_cost(
    path: Path,
    meta: Mapping[str, Any],
    summary: Summary,
    items: Mapping[str, Sequence[Item]],
    tasks: Mapping[str, Task],
    answers: Sequence[Mapping[str, Any]],
    out: Path,
    options: Options,
) -> EqualCost:
    """Draw, write `cost.csv` and `contests.csv`, and return the page's section."""
    policies = read_policies(meta)
    measured = read_times(path)
    times = times_by_policy(measured)
    tokens = tokens_by_policy(answers, policies, summary.num_layers) if summary.num_layers else {}
    found = {
        task.name: points(summary, task, policies, tokens, times, options.confidence)
        for task in summary.tasks
    }
    budgets = {
        task.name: contests(tasks[task.name], task, items[task.name], found[task.name], options)
        for task in summary.tasks
    }
    write_table(out / "cost.csv", COSTS, _cost_rows(found))
    write_table(out / "contests.csv", CONTESTS, _contest_rows(summary.tasks, budgets, options))
    figures = figures_cost.draw(summary.tasks, found, out)
    views = [
        view
        for task in summary.tasks
        if (view := _task_view(task, budgets[task.name], options))["budgets"]
    ]
    return EqualCost(figures, views, _timed(measured) if times else "")


def read_times(path: Path) -> Mapping[str, Any] | None:
    """What a run measured of its policies' time; None where it measured none."""
    try:
        found = json.loads((path / TIMES).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _timed(measured: Mapping[str, Any] | None) -> str:
    about = measured or {}
    requests, rounds = (
        counted(about[name + "s"], name) if name + "s" in about else f"? {name}s"
        for name in ("request", "round")
    )
    return (
        f"Prefill time: {requests} at once, up to their first tokens, pictures encoded "
        f"before; {rounds} in which every policy had its turn, each beside the "
        f"baseline of its round, on {about.get('hardware', 'an unnamed machine')}; median [lowest, highest]."
    )


def title(point: Point) -> str:
    """A point's policy as a reader knows it: by its presets' names, if it has some."""
    name = point.policy.replace("=", " ")
    if point.method.name == DOWNSAMPLE:
        return name.replace("downsample", "reduced to")
    if point.method.name == CLIFF and ";" in name:
        layer = int(name.partition(":")[0])
        return f"cliff between {layer} and {layer + 1}"
    return f"{name} ({', '.join(point.names)})" if point.names else name


def _task_view(task: TaskResult, budgets: Sequence[Budget], options: Options) -> dict[str, Any]:
    share = text.is_share(task, task.headline)
    return {
        "title": text.task_title(task.name),
        "metric": text.metric_title(task.headline) + (", %" if share else ""),
        "lower": not task.higher_is_better,
        "budgets": [_budget_view(task, budget, share, options) for budget in budgets],
    }


def _budget_view(task: TaskResult, budget: Budget, share: bool, options: Options) -> dict[str, Any]:
    names = {point.policy: title(point) for point in budget.points}
    regained = {one.point.policy: one for one in budget.regained}
    rows = []
    for point in budget.points:
        again = regained.get(point.policy)
        beaten = budget.beaten_by(point, options.level, task.higher_is_better)
        rows.append(
            {
                "policy": names[point.policy],
                "control": point.method.control,
                "tokens": "–" if point.tokens is None else f"{point.tokens:.1f}",
                "value": text.number(point.value.value, share),
                "limits": text.limits(point.value, share),
                "seeds": _seeds(point, share),
                "time": ""
                if point.times is None
                else f"{100 * point.times.ratio:.0f} % [{100 * point.times.low:.0f}, {100 * point.times.high:.0f}]",
                "better": ", ".join(names[other.policy] for other in beaten),
                "regained": ""
                if again is None or again.share is None
                else f"{text.number(again.share.value)} {text.limits(again.share)}",
            }
        )
    lost = next(((r.questions, names[r.downsampled]) for r in budget.regained), None)
    return {
        "tokens": f"{budget.tokens:.0f}",
        "said": sentences(budget, names, options.level, task.higher_is_better),
        "rows": rows,
        "timed": any(row["time"] for row in rows),
        "lost": lost,
    }


def _seeds(point: Point, share: bool) -> str:
    """What several seeds say: their range, and how well they tell the mean of all seeds."""
    if point.seeds is None or point.between is None:
        return ""
    low, high = (text.number(end, share) for end in point.seeds)
    mean = point.between
    if share:
        mean = Interval(mean.value, max(mean.low, 0.0), min(mean.high, 1.0))
    return f"{counted(len(point.policies), 'seed')}: {low} to {high}; mean of all seeds {text.limits(mean, share)}"


def _cost_rows(found: Mapping[str, Sequence[Point]]) -> Iterable[tuple[Any, ...]]:
    for task, own in found.items():
        for p in own:
            times = (p.times.ratio, p.times.low, p.times.high) if p.times else ("", "", "")
            yield (
                task, p.policy, p.method.name, p.method.control, " ".join(p.names),
                "" if p.tokens is None else p.tokens, *times, p.value.value, p.value.low, p.value.high,
                *(p.seeds or ("", "")), *((p.between.low, p.between.high) if p.between else ("", "")),
            )  # fmt: skip


def _contest_rows(
    tasks: Sequence[TaskResult], budgets: Mapping[str, Sequence[Budget]], options: Options
) -> Iterable[tuple[Any, ...]]:
    for task in tasks:
        for budget in budgets[task.name]:
            for pair in budget.contests:
                won = pair.winner(options.level, task.higher_is_better)
                yield (
                    task.name, budget.tokens, pair.one.policy, pair.other.policy, pair.one.tokens,
                    pair.other.tokens, pair.difference.value, pair.difference.low, pair.difference.high,
                    pair.p_value, pair.p_corrected, "" if won is None else won.policy,
                )  # fmt: skip
