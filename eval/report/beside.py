"""What a sceptic asks beside the scores: same answers as the baseline? right where fewer tokens go wrong? (pure)

Equal scores can hide different answers, so a policy's answers are compared with the baseline's as the task read
them. And the questions that reduced pictures lose tell whether a cliff keeps what they throw away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_flow.eval.statistics.intervals import Interval, clustered_share
from vllm_flow.eval.tasks.base import Scored

ScoresById = Mapping[str, Scored]
CHANGE = 1e-9
"""Scores that differ by less are equal."""


def agreement(
    base: ScoresById, other: ScoresById, units: Mapping[str, str], confidence: float
) -> Interval | None:
    """Share of the items that both answered whose answers were read as the same; None without an item."""
    shared = [item for item in base if item in other]
    same = [float(base[item].parsed == other[item].parsed) for item in shared]
    return _share(same, shared, units, confidence)


def lost_items(base: ScoresById, reduced: Iterable[ScoresById]) -> set[str]:
    """The items that score lower than under the baseline with any of the policies."""
    return {
        item
        for scores in reduced
        for item, one in scores.items()
        if item in base and one.score < base[item].score - CHANGE
    }


def score_on(
    items: set[str], scores: ScoresById, units: Mapping[str, str], confidence: float
) -> Interval | None:
    """Mean score on those of the items that are answered; None where there is none."""
    there = [item for item in scores if item in items]
    return _share([scores[item].score for item in there], there, units, confidence)


def _share(
    values: list[float], items: list[str], units: Mapping[str, str], confidence: float
) -> Interval | None:
    if not values:
        return None
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(units[item], len(numbers)) for item in items]
    return clustered_share(values, places, confidence)
