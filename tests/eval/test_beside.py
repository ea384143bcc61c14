"""Agreement with the baseline's answers, and scores where reduced pictures lose."""

from __future__ import annotations

import pytest

from vllm_flow.eval.report.beside import Lengths, agreement, lengths, lost_items, score_on
from vllm_flow.eval.statistics.intervals import accuracy
from vllm_flow.eval.tasks.base import Scored


def scores(**given: tuple[object, float]) -> dict[str, Scored]:
    return {item: Scored(item, parsed, score) for item, (parsed, score) in given.items()}


BASE = scores(a=("yes", 1.0), b=("no", 1.0), c=("no", 0.0), d=(["x"], 0.5))
OTHER = scores(a=("yes", 1.0), b=("yes", 0.0), c=("maybe", 0.0), d=(["x"], 0.5), e=("no", 1.0))
ALONE = {item: item for item in "abcde"}


def test_agreement_is_of_what_was_read() -> None:
    """c scores 0 either way and is still another answer; e was not asked under the baseline."""
    found = agreement(BASE, OTHER, ALONE, 0.95)
    assert found is not None and found.value == 0.5
    assert found.low == pytest.approx(accuracy(2, 4).low)
    together = agreement(BASE, OTHER, {**ALONE, "b": "a", "c": "d"}, 0.95)
    assert together is not None and together.value == 0.5
    assert agreement(BASE, {}, ALONE, 0.95) is None


def test_scores_where_reduced_pictures_lose() -> None:
    reduced = [OTHER, scores(d=(["y"], 0.25), c=("no", 0.0), f=("x", 0.0))]
    lost = lost_items(BASE, reduced)
    assert lost == {"b", "d"}
    on_base, on_other = (score_on(lost, arm, ALONE, 0.95) for arm in (BASE, OTHER))
    assert on_base is not None and on_base.value == 0.75
    assert on_other is not None and on_other.value == 0.25
    assert score_on(set(), BASE, ALONE, 0.95) is None


def test_lengths_are_of_what_was_answered() -> None:
    """An answer that the limit cut is counted; errors, and rows that do not say their length, are left out."""
    recorded = [("Yes", 2, "stop"), ("No", 2, "stop"), ("A very", 8, "length")]
    recorded += [(None, None, None), ("No", None, None), (None, 4000, "length"), ("No", 4, None)]
    names = ("answer", "output_tokens", "finish_reason")
    rows = [dict(zip(names, row, strict=True)) for row in recorded]
    assert lengths(rows) == Lengths(4.0, 1)
    assert lengths(rows[3:6]) is None
