"""The CSV files of runs beside a reference: every pair, every answer of the pairs, every question left out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from vllm_flow.eval.report.compare import arm
from vllm_flow.eval.report.comparison import Comparison
from vllm_flow.eval.report.tables import write_table

PAIRS = (
    "task", "reference", "reference_policy", "run", "policy", "metric", "headline", "questions", "paired", "pictures",
    "reference_value", "reference_low", "reference_high", "value", "low", "high", "difference", "difference_low",
    "difference_high", "standard_error", "p", "p_holm", "detectable", "verdict", "within_tolerance", "gained", "lost",
    "mcnemar_p", "method", "agreement", "agreement_low", "agreement_high", "reference_answer_tokens",
    "reference_cut_off", "answer_tokens", "cut_off",
)  # fmt: skip
ITEMS = (
    "task", "item", "group", "run", "policy", "reference_policy", "reference_score", "score", "reference_parsed",
    "parsed", "reference_answer", "answer",
)  # fmt: skip
UNPAIRED = ("task", "item", "only_in", "not_in")


def write_tables(compared: Comparison, directory: Path) -> dict[str, Path]:
    """Write `comparison.csv`, `items.csv` and `unpaired.csv`; name -> path."""
    plans: dict[str, tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]] = {
        "comparison": (PAIRS, pair_rows(compared)),
        "items": (ITEMS, item_rows(compared)),
        "unpaired": (UNPAIRED, unpaired_rows(compared)),
    }
    return {
        name: write_table(directory / f"{name}.csv", header, rows)
        for name, (header, rows) in plans.items()
    }


def pair_rows(compared: Comparison) -> Iterable[tuple[Any, ...]]:
    """A line per pair and metric, unrounded."""
    for pair in compared.pairs:
        result = pair.result
        lengths = [
            value
            for side in (pair.reference, result)
            for value in (astuple(side.lengths) if side.lengths else ("", ""))
        ]
        for metric, against in result.against.items():
            c = against.comparison
            yield (
                pair.task, compared.reference.label, pair.reference_policy, pair.run, pair.policy, metric,
                metric == pair.read.headline, pair.questions, result.paired, pair.pictures, *astuple(c.baseline),
                *astuple(c.treatment), *astuple(c.difference), c.standard_error, c.p_value, against.p_corrected,
                against.detectable, against.verdict.finding, against.verdict.within_tolerance, result.gained,
                result.lost, "" if result.mcnemar_p is None else result.mcnemar_p, pair.read.method(metric),
                *(astuple(result.agreement) if result.agreement else ("",) * 3), *lengths,
            )  # fmt: skip


def item_rows(compared: Comparison) -> Iterable[tuple[Any, ...]]:
    """A line per question that a pair rests on, with what both said and what it was worth."""
    said = {
        side.label: {(r["task"], r["policy"], r["item_id"]): r["answer"] for r in side.answers}
        for side in compared.sides
    }
    for pair in compared.pairs:
        label = compared.reference.label
        before = pair.read.scores[arm(label, pair.reference_policy)]
        after = pair.read.scores[arm(pair.run, pair.policy)]
        for item in (item for item in before if item in after):
            one, other = before[item], after[item]
            yield (
                pair.task, item, one.group, pair.run, pair.policy, pair.reference_policy, one.score, other.score,
                *(json.dumps(scored.parsed, ensure_ascii=False) for scored in (one, other)),
                said[label][pair.task, pair.reference_policy, item], said[pair.run][pair.task, pair.policy, item],
            )  # fmt: skip


def unpaired_rows(compared: Comparison) -> Iterable[tuple[Any, ...]]:
    """A line per question that only one run of two has."""
    reference = compared.reference.label
    for run, tasks in compared.questions.items():
        for task, one in tasks.items():
            yield from ((task, item, reference, run) for item in one.only_reference)
            yield from ((task, item, run, reference) for item in one.only_other)
