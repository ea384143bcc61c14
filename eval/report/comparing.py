"""Two policies' scores beside each other: pairs of answers, resampled and exact comparisons, corrections. (pure)"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from vllm_flow.eval.report.beside import CHANGE, ScoresById
from vllm_flow.eval.report.results import Compared, Options
from vllm_flow.eval.statistics.bootstrap import Array, Comparison, compare
from vllm_flow.eval.statistics.intervals import accuracy, holm, paired_difference, unseen_share
from vllm_flow.eval.statistics.power import detectable
from vllm_flow.eval.statistics.verdicts import judge
from vllm_flow.eval.tasks.base import Task, mean_metrics


def paired(base: ScoresById, treatment: ScoresById) -> tuple[ScoresById, ScoresById]:
    """The items that both have, in one order."""
    shared = [i for i in base if i in treatment]
    return {i: base[i] for i in shared}, {i: treatment[i] for i in shared}


def changed(base: ScoresById, treatment: ScoresById) -> tuple[int, int]:
    """How many items score higher than under the baseline, and how many lower; the same items in both."""
    changes = [treatment[i].score - base[i].score for i in base]
    gained, lost = (sum(sign * change > CHANGE for change in changes) for sign in (1, -1))
    return gained, lost


def against_baseline(
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


def resampled(
    task: Task,
    pairs: Sequence[tuple[ScoresById, ScoresById]],
    units: Mapping[str, str],
    options: Options,
    swaps: int,
) -> dict[str, list[Comparison]]:
    """Metric -> its comparison in each of the pairs, by bootstrap over pictures and by swaps of the arms."""
    if not pairs:
        return {}
    arms = [[pair[side]] for side in (0, 1) for pair in pairs]
    names, counts = counts_by_unit(task, arms, units)
    baseline, treatment = np.split(counts, 2)
    return compare(
        names,
        baseline,
        treatment,
        task.metrics,
        resamples=options.resamples,
        swaps=swaps,
        confidence=options.confidence,
        seed=options.seed,
    )


def counts_by_unit(
    task: Task, arms: Sequence[Sequence[ScoresById]], units: Mapping[str, str]
) -> tuple[list[str], Array]:
    """The names of the K counts, and the counts [A, U, K] of each arm's units, bundles whole.

    Args:
        arms: the answers of one policy each, or of several (seeds), of which the mean is taken: they answer the
            same questions, which are no more for it.
        units: the picture of each item.
    """
    number = {unit: index for index, unit in enumerate(dict.fromkeys(units.values()))}
    scored = [[task.together(answers.values()) for answers in arm] for arm in arms]
    names = sorted({n for arm in scored for answers in arm for s in answers for n in s.counts})
    column = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(arms), len(number), len(names)))
    for place, arm in enumerate(scored):
        for one in itertools.chain.from_iterable(arm):
            for name, count in one.counts.items():
                counts[place, number[units[one.id]], column[name]] += count / len(arm)
    return names, counts


def mean_scores(task: Task, scores: Iterable[ScoresById]) -> set[str]:
    """The metrics that are the mean of the scores under every policy that has answers."""
    found = [mean_metrics(task, task.together(one.values())) for one in scores if one]
    return set.intersection(*found) if found else set()


def _exact(
    base: ScoresById, treatment: ScoresById, found: Comparison, options: Options
) -> Comparison:
    """A resampled comparison of two shares of right answers, by exact methods."""
    before, after = ([s.score > 0.5 for s in arm.values()] for arm in (base, treatment))
    difference = paired_difference(before, after, options.confidence)
    return Comparison(
        accuracy(sum(before), len(before), options.confidence),
        accuracy(sum(after), len(after), options.confidence),
        difference.difference,
        difference.p_value,
        found.standard_error,
        found.identical,
    )
