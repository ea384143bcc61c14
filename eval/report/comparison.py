"""What was compared of several runs, and what there is to say of it, in words and numbers as text. (no files)

Read by the page, the tables, the figures and the terminal of `vllm-flow report A B ...`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.report import text
from vllm_flow.eval.report.compare import Pair
from vllm_flow.eval.report.matching import SHORT, Questions, Side, digest
from vllm_flow.eval.report.page import LONG, WORDS
from vllm_flow.eval.report.results import Options, policies_of
from vllm_flow.eval.statistics.verdicts import Finding
from vllm_flow.eval.tasks.reading import few

NAMED = 10
"""Questions without a partner that the page names; `unpaired.csv` names all."""
ACROSS = (
    "Each task stands by itself, with 95 % for its own interval and Holm's correction over its own pairs; nothing "
    "corrects across tasks."
)
FOUND: Mapping[Finding, str] = {
    "worse": "worse",
    "better": "better",
    "none": "no difference found",
    "identical": "with every answer scored the same",
}
"""How pairs come out, as their counts are told."""


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared."""

    reference: Side
    others: Sequence[Side]
    questions: Mapping[str, Mapping[str, Questions]]
    """By run's label and task."""
    pairs: Sequence[Pair]
    against: str | None
    """The reference's policy that every policy of the others is paired with; None where each is with its like."""
    unpaired: Mapping[str, Sequence[str]]
    """Policies that only one run has, by the run's label."""

    @property
    def sides(self) -> list[Side]:
        return [self.reference, *self.others]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(pair.task for pair in self.pairs))

    def of(self, task: str) -> list[Pair]:
        return [pair for pair in self.pairs if pair.task == task]


def titles(compared: Comparison) -> dict[str, str]:
    """Every policy's name as a reader knows it."""
    known = [p for side in compared.sides for p in policies_of(side.meta, side.answers)]
    return {policy.name: text.policy_title(policy) for policy in known}


def cells(pair: Pair, metric: str, names: Mapping[str, str], options: Options) -> dict[str, Any]:
    """A pair's metric, as text."""
    share, task, result = pair.share(metric), pair.read, pair.result
    against = result.against[metric]
    c = against.comparison
    return {
        "run": pair.run,
        "policy": names[pair.policy],
        "before": text.number(c.baseline.value, share),
        "before_limits": text.limits(c.baseline, share),
        "value": text.number(c.treatment.value, share),
        "limits": text.limits(c.treatment, share),
        "agreement": text.share_text(result.agreement),
        "tokens": " / ".join(
            f"{side.lengths.mean:.1f}" if side.lengths else "–" for side in (pair.reference, result)
        ),
        "cut": sum(side.lengths.cut for side in (pair.reference, result) if side.lengths),
        "paired": result.paired,
        "questions": pair.questions,
        **text.compared(against, result, share, task, options),
    }


def task_view(
    compared: Comparison, task: str, names: Mapping[str, str], options: Options
) -> dict[str, Any]:
    """Everything the template shows of a task's pairs."""
    pairs = compared.of(task)
    first = pairs[0].read
    rows = [cells(pair, pair.read.headline, names, options) for pair in pairs]
    share = all(pair.share(first.headline) for pair in pairs)
    lengths = [side.lengths for p in pairs for side in (p.reference, p.result) if side.lengths]
    return {
        "name": task,
        "title": text.task_title(task),
        "metric": text.metric_title(first.headline),
        "percent": share,
        "lower": not first.higher_is_better,
        "binary": first.binary,
        "exact": all(first.headline in pair.read.exact for pair in pairs),
        "rows": rows,
        "folded": len(rows) > LONG,
        "facts": _facts(compared, pairs, rows),
        "said": [_said(side.label, pairs, options) for side in compared.others],
        "questions": _questions(compared, task),
        "long": any(one.cut or one.mean > WORDS for one in lengths),
        "repeated": any(pair.pictures != pair.result.paired for pair in pairs),
        "others": [
            {
                "title": text.metric_title(metric),
                "cells": [
                    cells(pair, metric, names, options) if metric in pair.result.against else None
                    for pair in pairs
                ],
            }
            for metric in first.metrics[1:]
        ],
    }


def _facts(
    compared: Comparison, pairs: Sequence[Pair], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per run for the page's top: under the baseline, or under the first policy that it shares."""
    found = []
    for side in compared.others:
        own = [row for pair, row in zip(pairs, rows, strict=True) if pair.run == side.label]
        found += own[:1]  # the reference's policies come in its order, its baseline first
    return found


def _said(run: str, pairs: Sequence[Pair], options: Options) -> str:
    """How a run's pairs came out, in one sentence."""
    own = [pair for pair in pairs if pair.run == run]
    if not own:
        return f"{run}: no question was answered in both runs."
    found = Counter(pair.headline.verdict.finding for pair in own)
    within = sum(pair.headline.verdict.within_tolerance for pair in own)
    told = ", ".join(f"{found[name]} {words}" for name, words in FOUND.items() if found[name])
    size = text.tolerance_text(options.tolerance)
    return f"{run}: {counted(len(own), 'pair')}: {told}; {within} shown to lie within ±{size}."


def _questions(compared: Comparison, task: str) -> list[str]:
    """What was and what was not paired of a task, run by run."""
    found = []
    for side in compared.others:
        one = compared.questions[side.label].get(task)
        if one is None:
            found.append(f"{side.label} was not asked it.")
            continue
        told = f"{side.label}: {counted(len(one.items), 'question')} in common, the same words about the same data"
        told += f" (SHA-256 {digest(one.items)[:SHORT]}…)"
        for label, only in (
            (compared.reference.label, one.only_reference),
            (side.label, one.only_other),
        ):
            if only:
                told += f"; {len(only)} only in {label} and left out: {few(only, NAMED)}"
        if one.unseen:
            told += f"; the picture files of {one.unseen} are not both here, so their bytes were not compared"
        found.append(told + ".")
    return found


def gaps(compared: Comparison) -> list[str]:
    """What could not be compared, in sentences."""
    found = [
        f"{side.label}: {text.task_title(task)} could not be read: {why}"
        for side in compared.sides
        for task, why in side.unread.items()
    ]
    for side in compared.sides:
        rest = compared.others if side is compared.reference else [compared.reference]
        alone = [t for t in side.items if not any(t in other.items for other in rest)]
        if alone:
            told = ", ".join(map(text.task_title, alone))
            found.append(f"Only in {side.label}, and left out: {told}.")
    for label, names in compared.unpaired.items():
        found.append(
            f"{counted(len(names), 'policy', 'policies')} only in {label}, and left out: {few(names, NAMED)} "
            "(--against POLICY pairs every policy with one of the reference)."
        )
    for task in compared.tasks:
        short = [pair for pair in compared.of(task) if pair.result.paired < pair.questions]
        if short:
            lacking = sum(pair.questions - pair.result.paired for pair in short)
            pairs = ", ".join(f"{pair.policy} of {pair.run}" for pair in short[:4])
            more = f" and {len(short) - 4} more" if len(short) > 4 else ""
            found.append(
                f"{text.task_title(task)}: {counted(lacking, 'pair')} of answers not there, since one of the two runs "
                f"has an error or no answer yet ({pairs}{more})."
            )
    return found


def doubts(compared: Comparison) -> list[str]:
    """Answers in which a task's rule finds nothing that it looks for, of both sides of a run's first pair."""
    found: dict[str, None] = {}
    for task in compared.tasks:
        for pair in {pair.run: pair for pair in reversed(compared.of(task))}.values():
            for name, scores in pair.read.scores.items():
                count = sum(one.unclear for one in scores.values())
                if count and pair.read.unclear:
                    found[
                        f"{text.task_title(task)}, {name}: answers that {pair.read.unclear}: {count} of {len(scores)}."
                    ] = None
    return list(found)
