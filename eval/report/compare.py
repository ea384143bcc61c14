"""`vllm-flow report A B`: two runs on the questions that both answered, policy by policy.

Two models, two versions of vLLM, CPU against GPU: whatever differs between the runs, each question is its own
pair. A question counts if both runs asked it under the policy, in the same words about the same truth; what
only looks the same by its id is left out and counted.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_flow.eval.report.results import Compared, Options
from vllm_flow.eval.report.summary import summarise
from vllm_flow.eval.statistics.intervals import Interval, holm
from vllm_flow.eval.statistics.verdicts import judge
from vllm_flow.eval.tasks.base import Item, Task
from vllm_flow.outputs import write_whole

ROLES = {"policies": [{"name": "A", "kind": "baseline"}, {"name": "B", "kind": "unlisted"}]}
COLUMNS = (
    "task", "policy", "metric", "questions", "a", "b", "difference", "difference_low", "difference_high", "p",
    "p_holm", "same_answer", "finding", "within_tolerance",
)  # fmt: skip
NOT_SETTINGS = ("tasks", "policies", "sessions", "version", "created", "command", "data")


@dataclass(frozen=True)
class Pair:
    """A task's headline under one policy in both runs."""

    task: str
    policy: str
    metric: str
    questions: int
    compared: Compared
    """B beside A."""
    agreement: Interval
    share: bool
    """Whether the metric is a share."""


def common_items(
    a: Mapping[str, Sequence[Item]], b: Mapping[str, Sequence[Item]]
) -> tuple[dict[str, list[Item]], dict[str, int]]:
    """Per task the questions that both runs have, and how many share an id but not the question."""
    common: dict[str, list[Item]] = {}
    strange: dict[str, int] = {}
    for task in (name for name in a if name in b):
        theirs = {item.id: item for item in b[task]}
        shared = [item for item in a[task] if item.id in theirs]
        same = [i for i in shared if _question(i) == _question(theirs[i.id])]
        common[task], strange[task] = same, len(shared) - len(same)
    return common, strange


def _question(item: Item) -> tuple[str, dict[str, Any]]:
    return item.text, dict(item.truth)


def compare_runs(
    items: Mapping[str, Sequence[Item]],
    answers_a: Sequence[Mapping[str, Any]],
    answers_b: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Task],
    options: Options,
    order: Sequence[str] = (),
) -> list[Pair]:
    """Every task and policy that both runs answered, B beside A; p values corrected per task.

    Args:
        order: of policies, as far as they are named.
    """
    rows = {"A": answers_a, "B": answers_b}
    asked = {
        role: {(row["task"], row["policy"]) for row in answers if row["answer"] is not None}
        for role, answers in rows.items()
    }
    pairs: list[Pair] = []
    both = asked["A"] & asked["B"]
    named = dict.fromkeys([*order, *sorted({policy for _, policy in both})])
    for task, policy in ((task, policy) for task in items for policy in named):
        if (task, policy) not in both or not items[task]:
            continue
        renamed = [
            {**row, "policy": role}
            for role, answers in rows.items()
            for row in answers
            if (row["task"], row["policy"]) == (task, policy)
        ]
        summary = summarise(ROLES, {task: items[task]}, renamed, tasks, options)
        result = summary.tasks[0].result("B")
        headline = summary.tasks[0].headline
        if result is None or headline not in result.against or result.agreement is None:
            continue
        compared = result.against[headline]
        sides = (compared.comparison.baseline.value, compared.comparison.treatment.value)
        share = all(0 <= value <= 1 for value in sides)
        pairs.append(Pair(task, policy, headline, result.paired, compared, result.agreement, share))
    return _corrected(pairs, tasks, options)


def _corrected(pairs: Sequence[Pair], tasks: Mapping[str, Task], options: Options) -> list[Pair]:
    found = []
    for task in dict.fromkeys(pair.task for pair in pairs):
        own = [pair for pair in pairs if pair.task == task]
        corrected = holm([pair.compared.comparison.p_value for pair in own])
        for pair, p in zip(own, corrected, strict=True):
            verdict = judge(
                pair.compared.comparison.difference,
                p,
                identical=pair.compared.comparison.identical,
                higher_is_better=tasks[task].higher_is_better,
                tolerance=options.tolerance,
                level=options.level,
                unseen=pair.compared.unseen,
            )
            compared = replace(pair.compared, p_corrected=p, verdict=verdict)
            found.append(replace(pair, compared=compared))
    return found


def settings_that_differ(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """What of two `run.json` is not the same, versions one by one."""
    flat = [
        {
            **{name: value for name, value in meta.items() if name not in NOT_SETTINGS},
            **{f"version of {name}": value for name, value in meta.get("versions", {}).items()},
        }
        for meta in (a, b)
    ]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if name != "versions"]
    return {
        name: (flat[0].get(name), flat[1].get(name))
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    }


def write_comparison(path: Path, pairs: Sequence[Pair]) -> Path:
    """Write the pairs as CSV, unrounded."""

    def write(draft: Path) -> None:
        with draft.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(COLUMNS)
            for pair in pairs:
                found, c = pair.compared, pair.compared.comparison
                writer.writerow(
                    (
                        pair.task, pair.policy, pair.metric, pair.questions, c.baseline.value, c.treatment.value,
                        c.difference.value, c.difference.low, c.difference.high, c.p_value, found.p_corrected,
                        pair.agreement.value, found.verdict.finding, found.verdict.within_tolerance,
                    )
                )  # fmt: skip

    return write_whole(path, write)
