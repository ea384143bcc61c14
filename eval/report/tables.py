"""The report's CSV files: every number behind its tables and figures, unrounded."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from vllm_flow.eval.report.results import Summary
from vllm_flow.eval.report.savings import Saving
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.outputs import write_whole

SCORES = (
    "task", "policy", "kind", "layer", "metric", "headline", "value", "low", "high", "items", "answered", "failed",
    "missing", "paired", "baseline_on_pairs", "value_on_pairs", "difference", "difference_low", "difference_high",
    "standard_error", "p", "p_holm", "detectable", "verdict", "within_tolerance", "gained", "lost",
    "mcnemar_p", "method", "agreement", "agreement_low", "agreement_high", "where_downsampling_loses",
    "where_downsampling_loses_low", "where_downsampling_loses_high", "answer_tokens", "cut_off",
)  # fmt: skip


def write_tables(
    summary: Summary, answers: Sequence[Mapping[str, Any]], directory: Path
) -> dict[str, Path]:
    """Write `scores.csv`, `savings.csv`, `items.csv` and `errors.csv`; name -> path."""
    return {
        "scores": write_table(directory / "scores.csv", SCORES, score_rows(summary)),
        "savings": write_table(
            directory / "savings.csv",
            ("task", *(field.name for field in fields(Saving))),
            saving_rows(summary),
        ),
        "items": write_table(
            directory / "items.csv",
            (
                "task",
                "item",
                "group",
                "policy",
                "score",
                "parsed",
                "answer",
                "tokens",
                "finish_reason",
            ),
            item_rows(summary, answers),
        ),
        "errors": write_table(
            directory / "errors.csv",
            ("task", "policy", "requests", "reason"),
            (
                (task, policy, count, reason)
                for (task, policy), reasons in sorted(summary.errors.items())
                for reason, count in reasons.most_common()
            ),
        ),
    }


def score_rows(summary: Summary) -> Iterable[tuple[Any, ...]]:
    """A line per task, policy and metric; empty cells where there is nothing to compare."""
    for task in summary.tasks:
        for result in task.policies:
            for metric, value in result.values.items():
                headline = metric == task.headline
                against = result.against.get(metric)
                compared: tuple[Any, ...] = ("",) * 10
                if against:
                    c = against.comparison
                    compared = (
                        c.baseline.value, c.treatment.value, c.difference.value, c.difference.low,
                        c.difference.high, c.standard_error, c.p_value, against.p_corrected,
                        against.detectable, against.verdict.finding,
                    )  # fmt: skip
                yield (
                    task.name, result.policy.name, result.policy.kind,
                    _blank(result.policy.layer(summary.num_layers)), metric, headline, *astuple(value),
                    task.items, result.answered, result.failed, result.missing, result.paired,
                    *compared, against.verdict.within_tolerance if against else "",
                    result.gained if against else "", result.lost if against else "",
                    _blank(result.mcnemar_p), task.method(metric), *_limits(result.agreement),
                    *_limits(result.where_reduced_loses),
                    *(astuple(result.lengths) if result.lengths else ("", "")),
                )  # fmt: skip


def saving_rows(summary: Summary) -> Iterable[tuple[Any, ...]]:
    """A line per task and policy, and one over all tasks (`*`)."""
    for task, savings in (("*", summary.savings), *summary.task_savings.items()):
        for saving in savings:
            yield (task, *(_blank(value) for value in astuple(saving)))


def item_rows(summary: Summary, answers: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Any, ...]]:
    """A line per scored answer, with what was read from it."""
    said = {(row["task"], row["policy"], row["item_id"]): row for row in answers}
    for task in summary.tasks:
        for policy, scored in task.scores.items():
            for item, one in scored.items():
                row = said[task.name, policy, item]
                yield (
                    task.name, item, one.group, policy, one.score, json.dumps(one.parsed, ensure_ascii=False),
                    row["answer"], _blank(row.get("output_tokens")), _blank(row.get("finish_reason")),
                )  # fmt: skip


def _limits(interval: Interval | None) -> tuple[Any, ...]:
    return astuple(interval) if interval is not None else ("",) * 3


def _blank(value: Any) -> Any:
    return "" if value is None else value


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write one CSV file."""

    def write(draft: Path) -> None:
        with draft.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(header)
            writer.writerows(rows)

    return write_whole(path, write)
