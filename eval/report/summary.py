"""From answers to results: scores, comparisons with the baseline, found cliffs, savings, gaps. (pure)

Takes items and answer rows as they stand in a run directory and the tasks that score them; knows no
files, figures or pages. A run may be unfinished: whatever is there is summarised, and what is not is
counted. Unknown kinds of policies are compared like any other, but have no place on the layer axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm_flow.eval.report.beside import ScoresById, agreement, lengths, lost_items, score_on
from vllm_flow.eval.report.comparing import (
    against_baseline,
    changed,
    mean_scores,
    paired,
    resampled,
)
from vllm_flow.eval.report.results import (
    Options,
    Policy,
    PolicyResult,
    Summary,
    TaskResult,
    policies_of,
)
from vllm_flow.eval.report.savings import savings
from vllm_flow.eval.statistics.intervals import Interval, accuracy, mcnemar_p
from vllm_flow.eval.statistics.verdicts import CliffEvidence, FoundCliff, find_cliff, loss_of
from vllm_flow.eval.tasks.base import Item, Scored, Task, measured, partly_measured

AnswerRow = Mapping[str, Any]
"""A row of `vllm_flow.eval.sweep.schema.ANSWERS`."""


def summarise(
    meta: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    answers: Sequence[AnswerRow],
    tasks: Mapping[str, Task],
    options: Options | None = None,
    unread: Mapping[str, str] | None = None,
) -> Summary:
    """Summarise a run.

    Args:
        meta: `run.json`; only "num_layers" and "policies" are used, and policies that are only in the
            answers are added with the kind "unlisted".
        items: per task, in order. A task without items or without a `Task` is left out.
        answers: rows without repetition.
        tasks: what scores them.
        unread: reasons for tasks the caller could not read, passed on.
    """
    options = options or Options()
    policies = policies_of(meta, answers)
    layers = meta.get("num_layers")
    rows: dict[tuple[str, str], dict[str, AnswerRow]] = {}
    errors: dict[tuple[str, str], Counter[str]] = {}
    for row in answers:
        key = (row["task"], row["policy"])
        if row["answer"] is None:
            errors.setdefault(key, Counter())[row["error"] or "no reason given"] += 1
        rows.setdefault(key, {})[row["item_id"]] = row
    results = []
    for name in items:
        if name in tasks:
            of_task = {p.name: rows.get((name, p.name), {}) for p in policies}
            results.append(
                _task_result(tasks[name], items[name], policies, of_task, layers, options)
            )
    return Summary(
        num_layers=layers,
        policies=policies,
        tasks=tuple(results),
        savings=savings(policies, answers, layers),
        task_savings={
            result.name: savings(policies, [r for r in answers if r["task"] == result.name], layers)
            for result in results
        },
        errors=errors,
        unread=unread or {},
    )


def _task_result(
    task: Task,
    items: Sequence[Item],
    policies: Sequence[Policy],
    rows: Mapping[str, Mapping[str, AnswerRow]],
    layers: int | None,
    options: Options,
) -> TaskResult:
    scores = {policy.name: _scored(task, items, rows[policy.name]) for policy in policies}
    units = {item.id: item.picture_of for item in items}
    base = next((p.name for p in policies if p.kind == "baseline" and scores[p.name]), None)
    answered = [p.name for p in policies if scores[p.name]]
    others = [name for name in answered if base and name != base]
    compared = [name for name in others if base and scores[name].keys() & scores[base].keys()]
    # A policy beside itself gives its own intervals on all its answers.
    alone = resampled(task, [(scores[n], scores[n]) for n in answered], units, options, swaps=1)
    pairs = [paired(scores[base], scores[n]) for n in compared] if base else []
    beside = resampled(task, pairs, units, options, swaps=options.swaps)
    every = [one for own in scores.values() for one in own.values()]
    shown = measured(task, alone, every)
    alone, beside = ({m: of[m] for m in shown if m in of} for of in (alone, beside))
    distinct = len(set(units.values()))
    means = mean_scores(task, scores.values()) if task.binary and distinct == len(items) else set()
    against = against_baseline(task, compared, pairs, beside, means, units, options)
    reduced = [scores[p.name] for p in policies if p.kind == "downsample"]
    lost_there = lost_items(scores[base], reduced) if base else set()
    results = []
    for policy in policies:
        name, given = policy.name, rows[policy.name]
        own_scores = scores[name]
        failed = sum(given.get(item.id, {}).get("error") is not None for item in items)
        values = {m: alone[m][answered.index(name)].treatment for m in alone if name in answered}
        if values:
            values |= _shares(means, own_scores, options)
        pair = pairs[compared.index(name)] if name in compared else ({}, {})
        gained, lost = changed(*pair)
        results.append(
            PolicyResult(
                policy,
                answered=len(scores[name]),
                failed=failed,
                missing=len(items) - len(scores[name]) - failed,
                paired=len(pair[0]),
                values=values,
                against=against.get(name, {}),
                gained=gained,
                lost=lost,
                agreement=agreement(*pair, units, options.confidence),
                where_reduced_loses=score_on(lost_there, own_scores, units, options.confidence),
                lengths=lengths(given[item.id] for item in items if item.id in given),
                mcnemar_p=mcnemar_p(gained, lost) if task.binary and name in compared else None,
            )
        )
    return TaskResult(
        task.name,
        task.headline,
        task.higher_is_better,
        task.binary,
        len(items),
        distinct,
        frozenset(means),
        tuple(sorted(alone, key=lambda m: m != task.headline)) or (task.headline,),
        tuple(results),
        _found(results, task, layers, options),
        scores,
        len(lost_there),
        task.unclear,
        tuple(partly_measured(task, shown, every)),
    )


def _shares(means: Collection[str], scores: ScoresById, options: Options) -> dict[str, Interval]:
    """The metrics that are shares of right answers, with exact intervals."""
    right = round(sum(one.score for one in scores.values()))
    return {metric: accuracy(right, len(scores), options.confidence) for metric in means}


def _scored(task: Task, items: Sequence[Item], given: Mapping[str, AnswerRow]) -> dict[str, Scored]:
    """The scores of the items that have an answer."""
    answers = ((item, given.get(item.id, {}).get("answer")) for item in items)
    return {item.id: task.score(item, said) for item, said in answers if said is not None}


def _found(
    results: Sequence[PolicyResult], task: Task, layers: int | None, options: Options
) -> FoundCliff | None:
    evidence = []
    for result in results:
        layer = result.policy.layer(layers)
        if layer is not None and task.headline in result.against:
            one = result.against[task.headline]
            loss = loss_of(one.comparison.difference, task.higher_is_better)
            evidence.append(CliffEvidence(layer, loss, one.p_corrected, one.unseen))
    return find_cliff(evidence, options.tolerance, options.level) if evidence else None
