"""From answers to results: scores, paired comparisons, found cliffs, savings, gaps. (pure)

Takes items and answer rows as they stand in a run directory and the tasks that score them; knows no
files, figures or pages. A run may be unfinished: whatever is there is summarised, and what is not is
counted. Unknown kinds of policies are compared like any other, but have no place on the layer axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_flow.eval.report.beside import agreement, lost_items, score_on
from vllm_flow.eval.report.results import (
    Compared,
    Options,
    Policy,
    PolicyResult,
    Summary,
    TaskResult,
    policies_of,
)
from vllm_flow.eval.report.savings import savings
from vllm_flow.eval.statistics.bootstrap import Comparison, compare
from vllm_flow.eval.statistics.intervals import (
    accuracy,
    holm,
    mcnemar_p,
    paired_difference,
    unseen_share,
)
from vllm_flow.eval.statistics.power import detectable
from vllm_flow.eval.statistics.verdicts import CliffEvidence, FoundCliff, find_cliff, judge, loss_of
from vllm_flow.eval.tasks.base import Item, Scored, Task

AnswerRow = Mapping[str, Any]
"""A row of `vllm_flow.eval.sweep.schema.ANSWERS`."""
SAME = 1e-9
"""A metric that equals the mean score up to this, under every policy, is the mean score."""


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
    alone = _compare(task, [(scores[n], scores[n]) for n in answered], units, options, swaps=1)
    pairs = [_paired(scores[base], scores[n]) for n in compared] if base else []
    beside = _compare(task, pairs, units, options, swaps=options.swaps)
    distinct = len(set(units.values()))
    means = _is_mean(alone, answered, scores) if task.binary and distinct == len(items) else set()
    against = _against(task, compared, pairs, beside, means, units, options)
    reduced = [scores[p.name] for p in policies if p.kind == "downsample"]
    lost_there = lost_items(scores[base], reduced) if base else set()
    results = []
    for policy in policies:
        name, given = policy.name, rows[policy.name]
        own_scores = scores[name]
        failed = sum(given.get(item.id, {}).get("error") is not None for item in items)
        values = {m: alone[m][answered.index(name)].treatment for m in alone if name in answered}
        if name in answered:
            right = round(sum(s.score for s in own_scores.values()))
            values |= {m: accuracy(right, len(own_scores), options.confidence) for m in means}
        pair = pairs[compared.index(name)] if name in compared else ({}, {})
        changes = [pair[1][i].score - pair[0][i].score for i in pair[0]]
        gained, lost = (sum(sign * c > SAME for c in changes) for sign in (1, -1))
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
    )


def _scored(task: Task, items: Sequence[Item], given: Mapping[str, AnswerRow]) -> dict[str, Scored]:
    """The scores of the items that have an answer."""
    answers = ((item, given.get(item.id, {}).get("answer")) for item in items)
    return {item.id: task.score(item, said) for item, said in answers if said is not None}


def _against(
    task: Task,
    compared: Sequence[str],
    pairs: Sequence[tuple[ScoresById, ScoresById]],
    beside: Mapping[str, Sequence[Comparison]],
    means: Collection[str],
    units: Mapping[str, str],
    options: Options,
) -> dict[str, dict[str, Compared]]:
    """Policy -> metric -> its comparison with the baseline, corrected over the policies.

    Args:
        compared: the policies that share answered items with the baseline; `pairs` are their scores
            on these, `beside` their resampled comparisons by metric.
        means: metrics that are shares of right answers to questions about distinct pictures: for
            these the exact comparison takes the resampled one's place.
        units: the picture of each item.
    """
    against: dict[str, dict[str, Compared]] = {name: {} for name in compared}
    for metric, comparisons in beside.items():
        if metric in means:
            both = zip(pairs, comparisons, strict=True)
            comparisons = [_exact(*pair, found, options) for pair, found in both]
        corrected = holm([c.p_value for c in comparisons])
        for name, comparison, p, pair in zip(compared, comparisons, corrected, pairs, strict=True):
            pictures = len({units[i] for i in pair[0]})
            unseen = unseen_share(pictures, options.confidence)
            against[name][metric] = Compared(
                comparison,
                p,
                detectable(
                    comparison.standard_error,
                    pictures,
                    len(compared),
                    options.confidence,
                    options.power,
                ),
                judge(
                    comparison.difference,
                    p,
                    identical=comparison.identical,
                    higher_is_better=task.higher_is_better,
                    tolerance=options.tolerance,
                    level=options.level,
                    unseen=unseen,
                ),
                unseen,
            )
    return against


ScoresById = Mapping[str, Scored]


def _paired(base: ScoresById, treatment: ScoresById) -> tuple[ScoresById, ScoresById]:
    """The items that both have, in one order."""
    shared = [i for i in base if i in treatment]
    return {i: base[i] for i in shared}, {i: treatment[i] for i in shared}


def _compare(
    task: Task,
    pairs: Sequence[tuple[ScoresById, ScoresById]],
    units: Mapping[str, str],
    options: Options,
    swaps: int,
) -> dict[str, list[Comparison]]:
    """All pairs at once: one entry per pair and metric."""
    if not pairs:
        return {}
    number = {unit: index for index, unit in enumerate(dict.fromkeys(units.values()))}
    arms = [[task.together(arm.values()) for arm in pair] for pair in pairs]
    names = sorted({n for pair in arms for arm in pair for s in arm for n in s.counts})
    column = {name: index for index, name in enumerate(names)}
    counts = np.zeros((2, len(pairs), len(number), len(names)))
    for p, pair in enumerate(arms):
        for arm, scored in enumerate(pair):
            for one in scored:
                for name, count in one.counts.items():
                    counts[arm, p, number[units[one.id]], column[name]] += count
    return compare(
        names,
        counts[0],
        counts[1],
        task.metrics,
        resamples=options.resamples,
        swaps=swaps,
        confidence=options.confidence,
        seed=options.seed,
    )


def _is_mean(
    alone: Mapping[str, Sequence[Comparison]],
    answered: Sequence[str],
    scores: Mapping[str, ScoresById],
) -> set[str]:
    """The metrics that are nothing but the share of right answers."""
    means = [float(np.mean([s.score for s in scores[name].values()])) for name in answered]
    return {
        metric
        for metric, found in alone.items()
        if all(abs(c.treatment.value - m) < SAME for c, m in zip(found, means, strict=True))
    }


def _exact(
    base: ScoresById, treatment: ScoresById, resampled: Comparison, options: Options
) -> Comparison:
    """The comparison of two shares of right answers by exact methods."""
    before, after = ([s.score > 0.5 for s in arm.values()] for arm in (base, treatment))
    paired = paired_difference(before, after, options.confidence)
    return Comparison(
        accuracy(sum(before), len(before), options.confidence),
        accuracy(sum(after), len(after), options.confidence),
        paired.difference,
        paired.p_value,
        resampled.standard_error,
        resampled.identical,
    )


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
