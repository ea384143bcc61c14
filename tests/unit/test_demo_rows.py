"""The demo's records, table, figure and page, on a made-up run with a known curve per kind."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.unit.synthetic import CLIFFS, ENGINE, FEW_CLIFFS, SEEN_FROM, synthetic_results
from vllm_flow.demo import results_figure, results_page, results_table
from vllm_flow.demo.command import TIMED_BATCH, WIDTH, default_cliffs, timed_batch, write_all
from vllm_flow.demo.kinds import BY_KEY, KINDS
from vllm_flow.demo.material import read_answer
from vllm_flow.demo.measurements import Answer, Results, Spread
from vllm_flow.demo.rows import (
    ENOUGH,
    equal_from,
    level_text,
    predicted_blocks,
    summarise,
)
from vllm_flow.eval.statistics.bootstrap import compare


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return synthetic_results(tmp_path_factory.mktemp("pictures"), headline=56)


def answers_of(results: Results, kind: str, cliff: int) -> list[Answer]:
    ids = {question.id for question in results.of_kind(kind)}
    return [a for a in results.answers if a.cliff == cliff and a.question_id in ids]


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


def test_table_prints_every_cliff_as_markdown(results: Results) -> None:
    console = Console(width=WIDTH, file=io.StringIO())
    console.print(results_table.table(results))
    printed = console.file.getvalue()
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(results.rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "…" not in "".join(lines)


def test_cells_say_what_the_rows_hold(results: Results) -> None:
    heads = results_table.headings(results)
    for row in results.rows:
        cells = dict(zip(heads, results_table.cells(row, results), strict=True))
        for kind, head in (
            ("choice", "choice %"),
            ("words", "words %"),
            ("unseen_style", "unseen %"),
        ):
            if score := row.score(kind):
                assert cells[head] == f"{100 * score.value.value:.0f}"
            else:
                assert cells[head] == ""
        assert bool(cells["found/invented"]) == (row.cliff in FEW_CLIFFS)
    assert "-0 " not in "".join(results_table.cells(results.rows[-2], results))


def test_rounds_that_disagree_are_told_and_not_drawn(results: Results) -> None:
    disturbed = Spread(2.0, 1.1, 3.1, 4)
    rows = [
        dataclasses.replace(row, speedup=disturbed) if row.cliff in (4, 6) else row
        for row in results.rows
    ]
    busy = dataclasses.replace(results, rows=rows)
    for row in busy.rows:
        cells = dict(zip(results_table.headings(busy), results_table.cells(row, busy), strict=True))
        told = cells["prefill × [range]"]
        assert told.startswith("disturbed [1.10, 3.10]") == (row.cliff in (4, 6)), told
    notes = results_table.notes
    assert any(f"Disturbed at 2 of {len(rows)} cliffs" in note for note in notes(busy))
    assert not any("Disturbed" in note for note in notes(results))
    axis = Axis()
    results_figure.draw_speed(axis, busy)
    [(measured, _)] = axis.drawn["errorbar"]
    assert measured == [row.cliff for row in rows if row.cliff not in (4, 6)]
    [(shown, *_)] = axis.drawn["vlines"]
    assert shown == [4, 6]


class Axis:
    """Stands where matplotlib's axis stands, and remembers what was drawn."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[tuple[Any, ...]]] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **_: self.drawn.setdefault(name, []).append(args)


def test_notes_give_this_runs_numbers(results: Results) -> None:
    text = " ".join(results_table.notes(results))
    for kind in results.kinds:
        assert f"{len(results.of_kind(kind.key))} {kind.what}" in text
        assert f"{kind.short} {level_text(results, kind.key)}" in text
    assert "guessing gives 33 %" in text  # three options each
    requests = sum(row.requests for row in results.rows)
    assert f"{requests} of {requests} requests" in text


def test_csv_has_a_line_per_cliff_kind_and_measure(results: Results, tmp_path: Path) -> None:
    results_table.write_csv(results, tmp_path / "results.csv")
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(lines) == 3 * len(CLIFFS) + (1 + 2) * len(FEW_CLIFFS)
    assert all(None not in line and None not in line.values() for line in lines)
    assert float(lines[-1]["speedup_ideal"]) == 1
    for line in lines:
        assert float(line["low"]) <= float(line["value"]) <= float(line["high"])


def test_json_holds_every_answer(results: Results, tmp_path: Path) -> None:
    results_table.write_json(results, tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert len(data["answers"]) == len(results.answers)
    assert data["rows"][0]["scores"].keys() == data["kinds"].keys() == BY_KEY.keys()
    assert data["kinds"]["captions"]["cliffs"] == list(FEW_CLIFFS)
    assert data["kinds"]["choice"]["chance"] == pytest.approx(1 / 3)
    assert data["questions"][0]["item"]["truth"] == results.questions[0].item.truth


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
    _, svg = results_figure.draw(results, tmp_path)
    results_page.write_page(results, svg, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', text))
    assert not re.search(r"<script|<link|href=|url\(", text)
    for kind in KINDS:
        assert f"<h2>{kind.title}</h2>" in text
    assert text.count('<article class="card') == 4 * results_page.EXAMPLES + results_page.CAPTIONED


def test_page_escapes_what_the_model_says(results: Results, tmp_path: Path) -> None:
    answers = [dataclasses.replace(a, said="<b>& a dog") for a in results.answers]
    _, svg = results_figure.draw(results, tmp_path)
    results_page.write_page(
        dataclasses.replace(results, answers=answers), svg, tmp_path / "index.html"
    )
    text = (tmp_path / "index.html").read_text()
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text


def test_a_run_without_times_or_with_few_kinds_is_shown(results: Results, tmp_path: Path) -> None:
    questions = [q for q in results.questions if q.kind in ("yes_no", "choice")]
    ids = {q.id for q in questions}
    answers = [a for a in results.answers if a.question_id in ids]
    assert write_all(summarise(ENGINE, questions, answers, {}), tmp_path)


def test_figure_fills_the_points_from_the_level_on(results: Results) -> None:
    """As many filled points as there are cliffs from the level on; none where nothing is claimed."""
    from matplotlib.figure import Figure

    for kind in results.kinds:
        axis = Figure().subplots()
        results_figure.draw_kind(axis, results, kind)
        colour, marker = results_figure.STYLES[kind.key]
        filled = [
            x
            for line in axis.lines
            if line.get_marker() == marker and line.get_markerfacecolor() == colour
            for x in line.get_xdata()
        ]
        level = equal_from(results, kind.key)
        cliffs = results.cliffs_of(kind.key)
        assert filled == [c for c in cliffs if c >= (cliffs[-1] if level is None else level)]


def test_every_kind_has_a_look_of_its_own() -> None:
    assert results_figure.STYLES.keys() == results_figure.LABELS.keys() == BY_KEY.keys()
    for part in zip(*results_figure.STYLES.values(), strict=True):
        assert len(set(part)) == len(KINDS)


def test_examples_are_drawn_alike_every_time(results: Results) -> None:
    questions = results.of_kind("yes_no")
    assert results_page.choose(questions, 10) == results_page.choose(questions, 10)
    assert len({question.picture for question in results_page.choose(questions, 10)}) == 10
    assert len(results_page.choose(questions, 99)) == len(questions)


def test_timed_batch_has_pictures_of_its_own(results: Results) -> None:
    batch = timed_batch(results.questions)
    assert len({question.picture for question in batch}) == len(batch) == TIMED_BATCH
    assert {question.kind for question in batch} == {"yes_no"}


def test_spoken_cliffs_include_both_ends() -> None:
    assert results_page.spread_over([*range(0, 31, 2)], 5) == [0, 8, 16, 22, 30]
    assert results_page.spread_over([0, 30], 5) == [0, 30]


def test_default_cliffs() -> None:
    assert default_cliffs(30, quick=False) == [*range(0, 30, 3)]
    assert default_cliffs(32, quick=True) == [0, 5, 10, 15, 20, 25, 30]


def caption(results: Results, objects: list[str], said: str) -> Answer:
    """A made-up caption of a scene with these objects."""
    asked = results.of_kind("captions")[0]
    item = dataclasses.replace(asked.item, truth={"objects": objects})
    asked = dataclasses.replace(asked, item=item)
    given = answers_of(results, "captions", 30)[0]
    return dataclasses.replace(given, said=said, reading=read_answer(asked, said))


def invented(words: str) -> str:
    return f'<span class="invented">{words}</span>'


def test_invented_words_are_marked_and_escaped(results: Results) -> None:
    answer = caption(results, ["dog"], "<i> A bus, two Buses & a busy dog")
    assert results_page.marked(answer) == (
        f"&lt;i&gt; A {invented('bus')}, two {invented('Buses')} &amp; a busy dog"
    )


def test_names_of_several_words_and_odd_plurals_are_marked_whole(results: Results) -> None:
    said = "Two wine glasses, three mice, a hot dog and a dog."
    assert results_page.marked(caption(results, ["dog"], said)) == (
        f"Two {invented('wine glasses')}, three {invented('mice')}, a {invented('hot dog')} and a dog."
    )
    # The other way about: the dog in "hot dog" is none.
    assert results_page.marked(caption(results, ["hot dog"], "A hot dog and a dog.")) == (
        f"A hot dog and a {invented('dog')}."
    )
    assert results_page.marked(caption(results, ["dog"], "")) == "(nothing)"
    # A name that begins another one.
    given = caption(results, ["dog"], "A car key and a car.")
    reading = dataclasses.replace(given.reading, named=("car", "car key"), invented=("car key",))
    assert results_page.marked(dataclasses.replace(given, reading=reading)) == (
        f"A {invented('car key')} and a car."
    )
