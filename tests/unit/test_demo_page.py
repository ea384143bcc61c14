"""The demo's page and figure, on a made-up run with a known curve per kind."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.unit.synthetic import ENGINE, answers_of
from vllm_flow.demo import results_figure, results_page
from vllm_flow.demo.command import write_all
from vllm_flow.demo.kinds import BY_KEY, KINDS
from vllm_flow.demo.material import read_answer
from vllm_flow.demo.measurements import Answer, Results
from vllm_flow.demo.rows import (
    equal_from,
    summarise,
)


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


def test_spoken_cliffs_include_both_ends() -> None:
    assert results_page.spread_over([*range(0, 31, 2)], 5) == [0, 8, 16, 22, 30]
    assert results_page.spread_over([0, 30], 5) == [0, 30]


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
