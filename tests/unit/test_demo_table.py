"""The demo's table, its notes, CSV and JSON, on a made-up run with a known curve per kind."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.unit.synthetic import CLIFFS, FEW_CLIFFS
from vllm_flow.demo import results_figure, results_table
from vllm_flow.demo.command import TIMED_BATCH, WIDTH, default_cliffs, timed_batch
from vllm_flow.demo.kinds import BY_KEY
from vllm_flow.demo.measurements import Results, Spread
from vllm_flow.demo.rows import (
    level_text,
)


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


def test_timed_batch_has_pictures_of_its_own(results: Results) -> None:
    batch = timed_batch(results.questions)
    assert len({question.picture for question in batch}) == len(batch) == TIMED_BATCH
    assert {question.kind for question in batch} == {"yes_no"}


def test_default_cliffs() -> None:
    assert default_cliffs(30, quick=False) == [0, 6, 12, 15, 18, 21, 24, 27]
    assert default_cliffs(32, quick=False) == [0, 6, 12, 18, 21, 24, 27, 30]
    assert default_cliffs(32, quick=True) == [0, 5, 10, 15, 20, 25, 30]
