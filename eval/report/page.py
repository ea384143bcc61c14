"""The report's page: one HTML file without outside parts. Computes what the template shows.

The template holds the explanations; numbers become text in `text`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.report import text
from vllm_flow.eval.report.cost_page import EqualCost
from vllm_flow.eval.report.examples import Answers, examples
from vllm_flow.eval.report.results import Options, PolicyResult, Summary, TaskResult
from vllm_flow.eval.report.templates import environment
from vllm_flow.eval.tasks.base import Item
from vllm_flow.outputs import write_text

LONG = 12
"""A task's table with more rows starts folded."""
WORDS = 8
"""Tokens of an answer from which on its length is shown: it is more than a word or a name."""


def data_uri(path: Path, kind: str) -> str:
    """A file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def order(results: Sequence[PolicyResult], layers: int | None) -> list[PolicyResult]:
    """Rows of a table: by layer with the baseline last, then the policies without a place there."""
    placed = [r for r in results if r.policy.layer(layers) is not None]
    others = [r for r in results if r.policy.layer(layers) is None]
    return sorted(placed, key=lambda r: r.policy.layer(layers) or 0) + sorted(
        others, key=lambda r: (r.policy.kind, r.policy.cliff or 0)
    )


def cells(task: TaskResult, result: PolicyResult, metric: str, options: Options) -> dict[str, Any]:
    """A metric under a policy, as text."""
    share = text.is_share(task, metric)
    value, against = result.values.get(metric), result.against.get(metric)
    row: dict[str, Any] = {
        "policy": text.policy_title(result.policy),
        "kind": result.policy.kind,
        "value": text.number(value.value, share) if value else "–",
        "limits": text.limits(value, share) if value else "",
        "answered": result.answered,
        "incomplete": result.missing + result.failed > 0,
        "difference": "",
        "difference_limits": "",
        "p": "",
        "corrected": "",
        "flips": "",
        "mcnemar": "",
        "verdict": "",
        "finding": "",
        "agreement": text.share_text(result.agreement),
        "where_reduced_loses": text.share_text(result.where_reduced_loses),
        "tokens": f"{result.lengths.mean:.1f}" if result.lengths else "–",
        "cut": result.lengths.cut if result.lengths else 0,
        "shown": task.cliff is not None
        and task.cliff.shown is not None
        and result.policy.kind in ("cliff", "text-only")
        and result.policy.cliff == task.cliff.shown,
    }
    if against:
        row |= text.compared(against, result, share, task, options)
    return row


def task_view(task: TaskResult, layers: int | None, options: Options) -> dict[str, Any]:
    """Everything the template shows of a task's numbers."""
    rows = [r for r in order(task.policies, layers) if r.answered]
    share = text.is_share(task, task.headline)
    shown = None
    if task.cliff and task.cliff.shown is not None:
        shown = next(r for r in rows if r.policy.layer(layers) == task.cliff.shown and r.against)
    floor = next((r for r in rows if r.policy.kind == "text-only"), None)
    return {
        "name": task.name,
        "title": text.task_title(task.name),
        "metric": text.metric_title(task.headline),
        "percent": share,
        "lower": not task.higher_is_better,
        "items": task.items,
        "pictures": task.pictures,
        "exact": task.headline in task.exact,
        "binary": task.binary,
        "rows": [cells(task, r, task.headline, options) for r in rows],
        "folded": len(rows) > LONG,
        "baseline": cells(task, task.baseline, task.headline, options) if task.baseline else None,
        "shown": cells(task, shown, task.headline, options) if shown else None,
        "shown_layer": task.cliff.shown if task.cliff else None,
        "seen_layer": task.cliff.seen if task.cliff else None,
        "headline": text.cliff_headline(task.cliff),
        "reduced_loses": task.reduced_loses,
        "long": any(r.lengths and (r.lengths.cut or r.lengths.mean > WORDS) for r in rows),
        "floor": cells(task, floor, task.headline, options) if floor else None,
        "cliff": text.cliff_text(task.cliff, options.tolerance, share),
        "swept": task.cliff is not None,
        "others": [
            {
                "title": text.metric_title(metric),
                "cells": [
                    text.number(r.values[metric].value, text.is_share(task, metric)) for r in rows
                ],
            }
            for metric in task.metrics[1:]
        ],
    }


def saving_rows(summary: Summary) -> list[list[str]]:
    """The savings table, in the order of the layer axis."""
    policies = {p.name: p for p in summary.policies}
    layers = summary.num_layers

    def place(name: str) -> tuple[bool, int, str]:
        layer = policies[name].layer(layers)
        return (layer is None, layer if layer is not None else policies[name].cliff or 0, name)

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.0f} %"

    rows = []
    for saving in sorted(summary.savings, key=lambda s: place(s.policy)):
        megabytes = saving.kv_bytes_saved
        rows.append(
            [
                text.policy_title(policies[saving.policy]),
                percent(saving.prefill_share),
                percent(saving.kv_share),
                "–" if megabytes is None else f"{megabytes / 2**20:.1f}",
                "–" if saving.image_tokens is None else f"{saving.image_tokens:.0f}",
                "–" if saving.seconds is None else f"{saving.seconds:.2f}",
            ]
        )
    return rows


def gaps(summary: Summary, meta: Mapping[str, Any]) -> list[str]:
    """What is not there, in sentences; empty for a complete run."""
    found = [
        f"{text.task_title(name)} could not be read: {why}" for name, why in summary.unread.items()
    ]
    known = {task.name for task in summary.tasks} | set(summary.unread)
    found += [
        f"No item of {name} was written." for name in meta.get("tasks", []) if name not in known
    ]
    for task in summary.tasks:
        asked = task.items * len(task.policies)
        missing = sum(r.missing for r in task.policies)
        if missing:
            whole = [r for r in task.policies if r.missing]
            names = ", ".join(text.policy_title(r.policy) for r in whole[:4])
            rest = counted(len(whole) - 4, "more policy", "more policies")
            more = f" and {rest}" if len(whole) > 4 else ""
            found.append(
                f"{text.task_title(task.name)}: {missing} of {counted(asked, 'answer is', 'answers are')} not there "
                f"yet ({names}{more})."
            )
        found += [f"{text.task_title(task.name)}: {note}." for note in task.partly]
        if task.baseline is None:
            found.append(_without_baseline(task))
    return found


def _without_baseline(task: TaskResult) -> str:
    """Why nothing can be compared with the baseline, and the remedy."""
    asked = next((r for r in task.policies if r.policy.kind == "baseline"), None)
    if asked is None:
        why = "has no baseline", "ask the policy “baseline” too"
    elif asked.missing:
        why = "has no answer under its baseline yet", "the same command of vllm-flow eval goes on"
    else:
        why = (
            "has only errors under its baseline",
            "mend what they say and give the same command of vllm-flow eval again with --retry-errors",
        )
    return f"{text.task_title(task.name)} {why[0]}, so nothing can be compared with it: {why[1]}."


def doubts(summary: Summary) -> list[str]:
    """Answers in which a task's rule finds nothing that it looks for: under the baseline, or where it has
    none, under the first policy."""
    found = []
    for task in summary.tasks:
        first = task.baseline or next((r for r in task.policies if r.answered), None)
        scores = task.scores.get(first.policy.name, {}) if first else {}
        count = sum(one.unclear for one in scores.values())
        if first and count and task.unclear:
            found.append(
                f"{text.task_title(task.name)}, {text.policy_title(first.policy)}: answers that "
                f"{task.unclear}: {count} of {len(scores)}."
            )
    return found


def shown_value(value: Any) -> str:
    """A setting as text: a command as it was typed, other lists and objects as JSON."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`run.json` as rows of text; what has places of its own on the page is left out."""
    apart = ("versions", "policies", "tasks", "version", "sessions")
    rows = [
        (name.replace("_", " "), shown_value(value))
        for name, value in meta.items()
        if name not in apart
    ]
    rows.append(("policies", ", ".join(p["name"] for p in meta.get("policies", []))))
    sessions = meta.get("sessions", [])
    if len(sessions) > 1:
        rows += [
            (f"session {number}", "; ".join(shown_value(value) for value in session.values()))
            for number, session in enumerate(sessions, start=1)
        ]
    return rows


def write_page(
    path: Path,
    summary: Summary,
    meta: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    answers: Answers,
    figures: Mapping[str, Path],
    options: Options,
    note: str | None = None,
    equal: EqualCost | None = None,
) -> None:
    """Write the page; `figures` are the SVG files by name, `note` is what the data says of itself, `equal`
    what there is of methods at equal cost."""
    layers = summary.num_layers
    reading = str(meta.get("image_reading", "server"))
    shown = [
        examples(t, items[t.name], answers, layers, options.seed, reading) for t in summary.tasks
    ]
    policies = {p.name: p for p in summary.policies}
    page = environment().get_template("report.html.j2").render(
        meta=meta,
        model=Path(str(meta.get("model", "a model"))).name,
        layers=layers,
        note=note,
        tasks=[task_view(t, layers, options) for t in summary.tasks if any(r.answered for r in t.policies)],
        figures={name: data_uri(svg, "svg+xml") for name, svg in figures.items()},
        reduced=any(p.kind == "downsample" and p.cliff is not None for p in summary.policies),
        savings=saving_rows(summary),
        equal=equal,
        equal_figures={} if equal is None else {
            name: data_uri(svg, "svg+xml") for name, svg in equal.figures.items()
        },
        examples=[one for one in shown if one],
        gaps=gaps(summary, meta),
        doubts=doubts(summary),
        errors=[
            (text.task_title(task), text.policy_title(policies[policy]), count, reason)
            for (task, policy), reasons in sorted(summary.errors.items())
            for reason, count in reasons.most_common()
        ],
        settings=settings(meta),
        versions=dict(meta.get("versions", {})),
        options=options,
        tolerance=text.exact(options.tolerance),
        across=text.ACROSS_TASKS,
    )  # fmt: skip
    write_text(path, page)
