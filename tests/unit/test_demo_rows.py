"""The demo's records, table, figure and page, on a made-up run with a known curve per kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.unit.synthetic import CLIFFS, ENGINE, FEW_CLIFFS, SEEN_FROM, answers_of
from vllm_flow.demo import results_page
from vllm_flow.demo.kinds import BY_KEY, KINDS
from vllm_flow.demo.measurements import Results
from vllm_flow.demo.rows import (
    ENOUGH,
    equal_from,
    level_text,
    predicted_blocks,
    spread,
    summarise,
)
from vllm_flow.eval.statistics.bootstrap import compare


def test_rows_ascend_to_the_baseline(results: Results) -> None:
    assert [row.cliff for row in results.rows] == list(CLIFFS)
    assert results.kinds == list(KINDS)
    for scores in results.baseline.scores.values():
        for score in scores.values():
            assert (score.difference.value, score.p_value) == (0, 1)


def test_questions_are_counted_as_right_or_wrong(results: Results) -> None:
    for row in results.rows:
        for kind in ("yes_no", "choice", "words", "unseen_style"):
            given = answers_of(results, kind, row.cliff)
            score = row.score(kind)
            if not BY_KEY[kind].every_cliff and row.cliff not in FEW_CLIFFS:
                assert score is None
                continue
            assert score is not None
            assert score.whole == len(given) == len(results.of_kind(kind))
            assert score.part == pytest.approx(sum(a.reading.score for a in given))
            assert score.value.value == pytest.approx(score.part / score.whole)
            assert score.value.low <= score.value.value <= score.value.high


def test_captions_are_counted_by_thing(results: Results) -> None:
    assert results.cliffs_of("captions") == list(FEW_CLIFFS)
    for row in results.rows:
        if row.cliff not in FEW_CLIFFS:
            assert row.score("captions") is None
            continue
        given = answers_of(results, "captions", row.cliff)
        found, invented = (row.scores["captions"][m] for m in ("found", "invented"))
        assert found.whole == 2 * len(given)
        assert invented.part == sum(len(a.reading.invented) for a in given)
        assert invented.whole == sum(len(a.reading.named) for a in given)
        # The made-up captions name two things, both there or both not.
        assert found.value.value == pytest.approx(1 - invented.value.value)


def test_ratios_have_the_evaluations_intervals(results: Results) -> None:
    """Words at one cliff, compared by themselves with the evaluation's bootstrap."""
    whole, cut = (
        np.array([[[a.reading.score, 1.0] for a in answers_of(results, "words", cliff)]])
        for cliff in (30, 10)
    )
    alone = compare(
        ["points", "answers"],
        whole,
        cut,
        lambda totals: {"right": totals["points"] / totals["answers"]},
    )["right"][0]
    score = next(row for row in results.rows if row.cliff == 10).score("words")
    assert score is not None
    assert score.difference.value == pytest.approx(alone.difference.value)
    assert score.difference.low == pytest.approx(alone.difference.low, abs=0.05)
    assert score.difference.high == pytest.approx(alone.difference.high, abs=0.05)


def test_a_missing_answer_is_an_error(results: Results) -> None:
    for kind in ("yes_no", "captions"):
        missing = answers_of(results, kind, 10)[0]
        rest = [answer for answer in results.answers if answer is not missing]
        with pytest.raises(KeyError):
            summarise(ENGINE, results.questions, rest, {})


def test_blocks_are_compared_per_request(results: Results) -> None:
    assert all(row.blocks_equal == row.requests for row in results.rows)
    first = results.answers[0]
    assert first.question_id.startswith("yes_no/")
    wrong = dataclasses.replace(first, blocks=(99,) * 15)
    changed = summarise(ENGINE, results.questions, [wrong, *results.answers[1:]], {})
    row = next(row for row in changed.rows if row.cliff == wrong.cliff)
    assert row.blocks_equal == row.requests - 1
    assert row.blocks > row.blocks_predicted


def test_prediction_drops_the_image_past_the_cliff(results: Results) -> None:
    answer = next(a for a in results.answers if a.cliff == 5 * 2)
    full = -(-answer.computed_tokens // 32)
    text = -(-(answer.computed_tokens - answer.image_tokens) // 32)
    assert predicted_blocks(answer, ENGINE) == (full,) * 5 + (text,) * 10


def test_ideal_is_one_at_the_baseline_and_grows(results: Results) -> None:
    ideals = [row.speedup_ideal for row in results.rows]
    assert ideals[-1] == 1
    assert ideals == sorted(ideals, reverse=True)


@pytest.mark.parametrize("kind", ["yes_no", "choice", "words", "captions"])
def test_levelling_off_is_told_where_the_last_difference_ends(results: Results, kind: str) -> None:
    cliff = equal_from(results, kind)
    assert cliff is not None and 4 < cliff <= max(SEEN_FROM[kind], 20)
    scores = {row.cliff: row.score(kind) for row in results.rows if row.score(kind)}
    assert not any(score.differs for c, score in scores.items() if c >= cliff)
    assert scores[max(c for c in scores if c < cliff)].differs
    assert level_text(results, kind) == f"from cliff {cliff}"


def test_a_difference_at_the_last_cliff_is_told(results: Results) -> None:
    """With its last cliff answered as cliff 0 is, no cliff is free of differences."""
    blind = {a.question_id: a for a in results.answers if a.cliff == 0}
    answers = [
        dataclasses.replace(blind[a.question_id], cliff=28, blocks=a.blocks) if a.cliff == 28 else a
        for a in results.answers
    ]
    changed = summarise(ENGINE, results.questions, answers, {})
    assert equal_from(changed, "yes_no") is None
    assert level_text(changed, "yes_no") == "up to the last cliff a difference"


def test_of_few_questions_nothing_is_claimed(results: Results) -> None:
    assert len(results.of_kind("unseen_style")) < ENOUGH
    assert equal_from(results, "unseen_style") is None
    assert level_text(results, "unseen_style") == "too few to compare"
    assert "too few" in results_page.fact(results, BY_KEY["unseen_style"]).small


def test_one_odd_round_of_five_is_left_out_of_the_range() -> None:
    values = [2.0, 0.6, 2.1, 4.0, 2.2]
    found = spread(values)
    assert (found.median, found.low, found.high, found.count) == (2.1, 2.0, 2.2, 5) and found.agrees
    assert not spread(values[:4]).agrees
    assert not spread([2.0, 0.6, 2.1, 0.7, 2.2]).agrees, "two are no accident"
