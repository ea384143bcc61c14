"""What a sceptic asks beside the scores: same answers as the baseline? right where fewer tokens go wrong? (pure)

Equal scores can hide different answers, so a policy's answers are compared with the baseline's as the task read
them. The questions that reduced pictures lose tell whether a cliff keeps what they throw away. And a long
answer that does not come to its end in time is scored on what there is of it, so its length is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.eval.statistics.intervals import Interval, clustered_share
from vllm_flow.eval.tasks.base import Scored

ScoresById = Mapping[str, Scored]
CHANGE = 1e-9
"""Scores that differ by less are equal."""


@dataclass(frozen=True)
class Lengths:
    """How long answers are."""

    mean: float
    """Tokens."""
    cut: int
    """Answers that ended because of the task's limit of tokens."""


def lengths(rows: Iterable[Mapping[str, Any]]) -> Lengths | None:
    """Of rows with an answer, as recorded; None where no row says its length."""
    told = [row for row in rows if row["answer"] is not None and row.get("output_tokens")]
    if not told:
        return None
    cut = sum(row.get("finish_reason") == "length" for row in told)
    return Lengths(sum(row["output_tokens"] for row in told) / len(told), cut)


def agreement(
    base: ScoresById, other: ScoresById, units: Mapping[str, str], confidence: float
) -> Interval | None:
    """Share of the items that both answered whose answers were read as the same; None without an item."""
    shared = [item for item in base if item in other]
    same = [float(base[item].parsed == other[item].parsed) for item in shared]
    return share_of(same, shared, units, confidence)


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
    return share_of([scores[item].score for item in there], there, units, confidence)


def share_of(
    values: Sequence[float], items: Sequence[str], units: Mapping[str, str], confidence: float
) -> Interval | None:
    """The mean of the items' values, those of one picture going together; None without an item."""
    if not values:
        return None
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(units[item], len(numbers)) for item in items]
    return clustered_share(values, places, confidence)
