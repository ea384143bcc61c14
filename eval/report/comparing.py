"""Two policies' scores beside each other: pairs of answers, resampled and exact comparisons, corrections. (pure)"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from vllm_flow.eval.report.beside import CHANGE, ScoresById
from vllm_flow.eval.report.results import Compared, Options
from vllm_flow.eval.statistics.bootstrap import Comparison, compare
from vllm_flow.eval.statistics.intervals import accuracy, holm, paired_difference, unseen_share
from vllm_flow.eval.statistics.power import detectable
from vllm_flow.eval.statistics.verdicts import judge
from vllm_flow.eval.tasks.base import Task

SAME = 1e-9
"""A metric that equals the mean score up to this, under every policy, is the mean score."""


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


def mean_scores(
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
