"""The demo's records, table, figure and page, on a made-up run with a known curve."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.unit.synthetic import ENGINE, synthetic_results
from vllm_flow.showcase import figure, material, page, table
from vllm_flow.showcase.command import TIMED_BATCH, WIDTH, default_cliffs, timed_batch, write_all
from vllm_flow.showcase.records import Results, equal_from, predicted_blocks, summarise


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return synthetic_results(tmp_path_factory.mktemp("pictures"), per_split=20)


def test_rows_ascend_to_the_baseline(results: Results) -> None:
    assert [row.cliff for row in results.rows] == [*range(0, 30, 2), 30]
    assert results.baseline.cliff == 30
    score = results.baseline.scores["seen"]
    assert (score.against_baseline.difference.value, score.against_baseline.p_value) == (0, 1)


def test_scores_count_the_answers(results: Results) -> None:
    row = results.rows[3]
    for split, score in row.scores.items():
        ids = {q.question_id for q in results.questions if q.split == split}
        right = [a.right for a in results.answers if a.cliff == row.cliff and a.question_id in ids]
        assert (score.correct, score.total) == (sum(right), len(right))


def test_a_missing_answer_is_an_error(results: Results) -> None:
    with pytest.raises(KeyError):
        summarise(ENGINE, results.questions, results.answers[:-1], {})


def test_blocks_are_compared_per_request(results: Results) -> None:
    assert all(row.blocks_equal == row.requests for row in results.rows)
    wrong = dataclasses.replace(results.answers[0], blocks=(99,) * 15)
    changed = summarise(ENGINE, results.questions, [wrong, *results.answers[1:]], {})
    row = next(row for row in changed.rows if row.cliff == wrong.cliff)
    assert row.blocks_equal == row.requests - 1
    assert row.blocks > row.blocks_predicted


def test_prediction_drops_the_image_past_the_cliff(results: Results) -> None:
    answer = next(a for a in results.answers if a.cliff == 5 * 2)
    full = -(-answer.computed_tokens // 32)
    text = -(-(answer.computed_tokens - 64) // 32)
    assert predicted_blocks(answer, ENGINE) == (full,) * 5 + (text,) * 10


def test_ideal_is_one_at_the_baseline_and_grows(results: Results) -> None:
    ideals = [row.speedup_ideal for row in results.rows]
    assert ideals[-1] == 1
    assert ideals == sorted(ideals, reverse=True)


def test_equal_from_stops_at_the_first_difference(results: Results) -> None:
    cliff = equal_from(results, "seen")
    assert cliff is not None
    by_cliff = {row.cliff: row.scores["seen"].against_baseline for row in results.rows}
    assert all(paired.p_value >= 0.05 for c, paired in by_cliff.items() if c >= cliff)
    assert (
        cliff == 0
        or by_cliff[cliff - 2].p_value < 0.05
        or not (by_cliff[cliff - 2].difference.low <= 0 <= by_cliff[cliff - 2].difference.high)
    )


def test_table_prints_every_cliff_as_markdown(results: Results) -> None:
    console = Console(width=WIDTH, file=io.StringIO())
    console.print(table.table(results))
    printed = console.file.getvalue()
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(results.rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "…" not in "".join(lines)


def test_csv_has_a_line_per_cliff_and_split(results: Results, tmp_path: Path) -> None:
    table.write_csv(results, tmp_path / "results.csv")
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(lines) == 3 * len(results.rows)
    assert all(None not in line and None not in line.values() for line in lines)
    assert float(lines[-1]["speedup_ideal"]) == 1


def test_json_holds_every_answer(results: Results, tmp_path: Path) -> None:
    table.write_json(results, tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert len(data["answers"]) == len(results.answers)
    assert data["rows"][0]["scores"].keys() == {"seen", "unseen_style", "photo"}


def test_written_files(results: Results, tmp_path: Path) -> None:
    written = write_all(results, tmp_path / "out")
    assert all(path.stat().st_size > 0 for path in written)
    assert {path.name for path in written} == {
        "index.html",
        "curve.png",
        "curve.svg",
        "results.csv",
        "results.json",
    }


def test_page_needs_nothing_from_outside(results: Results, tmp_path: Path) -> None:
    _, svg = figure.draw(results, tmp_path)
    page.write_page(results, svg, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', text))
    assert not re.search(r"<script|<link|href=|url\(", text)


def test_page_escapes_what_the_model_says(results: Results, tmp_path: Path) -> None:
    answers = [dataclasses.replace(a, said="<b>&") for a in results.answers]
    _, svg = figure.draw(results, tmp_path)
    page.write_page(dataclasses.replace(results, answers=answers), svg, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text


def test_page_works_without_times(results: Results, tmp_path: Path) -> None:
    untimed = summarise(ENGINE, results.questions, results.answers, {})
    assert write_all(untimed, tmp_path)


def test_examples_prefer_fresh_pictures(results: Results) -> None:
    questions = [q for q in results.questions if q.split == "seen"]
    chosen = page.choose(questions, 10)
    assert len({question.image_path for question in chosen}) == 10
    assert len(page.choose(questions, 15)) == 15


def test_timed_batch_has_pictures_of_its_own(results: Results) -> None:
    batch = timed_batch(results.questions)
    assert len({question.image_path for question in batch}) == len(batch) == TIMED_BATCH


def test_spoken_cliffs_include_both_ends() -> None:
    assert page.spread_over([*range(0, 31, 2)], 5) == [0, 8, 16, 22, 30]
    assert page.spread_over([0, 30], 5) == [0, 30]


def test_default_cliffs() -> None:
    assert default_cliffs(30, quick=False) == [*range(0, 30, 2)]
    assert default_cliffs(32, quick=True) == [0, 5, 10, 15, 20, 25, 30]


def test_lists_are_counted_per_cliff(results: Results) -> None:
    rows = page.list_rows(results)
    scenes = rows[0].shown // 2
    assert [(row.cliff, row.found, row.hallucinated) for row in rows] == [
        (0, 0, scenes),
        (10, scenes, scenes),
        (30, 2 * scenes, 0),
    ]


def test_invented_words_are_marked_and_escaped(results: Results) -> None:
    caption = dataclasses.replace(results.captions[0], said="<i> A bus, buses and a busy street")
    assert page.marked(caption) == (
        '&lt;i&gt; A <span class="invented">bus</span>, <span class="invented">buses</span>'
        " and a busy street"
    )


def test_held_out_questions_are_drawn_alike_every_time() -> None:
    questions = material.held_out(10)
    counts = {s: sum(q.split == s for q in questions) for s in ("seen", "unseen_style", "photo")}
    assert counts == {"seen": 10, "unseen_style": 3, "photo": 3}
    assert questions == material.held_out(10)
    assert all(question.image_path.exists() for question in questions)
    assert {question.label for question in questions} == {"yes", "no"}
    assert material.is_right(questions[0], questions[0].label.capitalize())
