"""The report of made-up runs of many shapes: unfinished, without a baseline, with answers that would break a page."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from tests.eval.pages import words
from tests.eval.synthetic_run import make_run
from vllm_flow.eval.report.command import write_report
from vllm_flow.eval.report.results import Options

FAST = Options(resamples=100, swaps=199)


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path, no_figures: None) -> None:
    run = make_run(tmp_path, ["pope"], "baseline,cliff=12,cliff=16", items=20, unfinished=0.2)
    run.extend(["textvqa"], [{"name": "cliff=18", "kind": "cliff", "cliff": 18}])
    summary, page = write_report(run.path, tmp_path / "out", FAST)
    shown = words(page)
    missing = sum(r.missing for r in summary.tasks[0].policies)
    assert "This run is not complete" in shown
    assert f"POPE: {missing} of 240 answers are not there yet" in shown
    assert "TextVQA could not be read" in shown


@pytest.mark.parametrize("reduced", ["downsample=12", "downsample=4x4"])
def test_the_caption_speaks_of_squares_where_there_are_some(
    tmp_path: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch, reduced: str
) -> None:
    """A picture reduced to k x k has no cliff of the same cost, and no square beside it."""
    monkeypatch.setattr(
        "vllm_flow.eval.report.figures.draw_all", lambda *_: {"scores": Path(__file__)}
    )
    run = make_run(tmp_path, ["scienceqa"], f"baseline,cliff=6,{reduced}", items=10)
    _, page = write_report(run.path, tmp_path / "out", FAST)
    assert ("Squares have the prefill cost" in words(page)) == (reduced == "downsample=12")


@pytest.mark.parametrize(("items", "shown"), [(12, False), (400, True)])
def test_results_have_columns_for_a_shown_cliff_where_one_is(
    tmp_path: Path, no_figures: None, items: int, shown: bool
) -> None:
    run = make_run(tmp_path, ["pope"], "baseline,cliff=6,cliff=29", items=items)
    summary, page = write_report(
        run.path, tmp_path / "out", Options(resamples=100, swaps=199, tolerance=0.2)
    )
    (cliff,) = (task.cliff for task in summary.tasks)
    assert cliff is not None and (cliff.shown is not None) == shown
    results = words(page).partition("Results")[2].partition("Every policy")[0]
    assert ("score there" in results) == ("verdict there" in results) == shown


def test_one_policy_is_enough_for_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["scienceqa"], "cliff=12", items=10)
    _, page = write_report(run.path, tmp_path / "out", FAST)
    shown = words(page)
    assert "has no baseline" in shown and "Answers that flipped" not in shown
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"failures": 1.0}, "only errors under its baseline.*--retry-errors"),
        ({"unfinished": 1.0}, "no answer under its baseline yet.*the same command"),
    ],
    ids=["failed", "not asked yet"],
)
def test_a_baseline_without_answers_is_not_asked_for(
    tmp_path: Path, no_figures: None, shares: dict[str, float], says: str
) -> None:
    run = make_run(tmp_path, ["scienceqa"], "cliff=12", items=10)
    baseline = make_run(tmp_path / "more", ["scienceqa"], "baseline,cliff=12", items=10, **shares)
    rows = [row for row in baseline.answers().to_pylist() if row["policy"] == "baseline"]
    asked = make_run(
        tmp_path / "asked", ["scienceqa"], "baseline,cliff=12", items=10, unfinished=1.0
    )
    asked.append(
        pa.Table.from_pylist(rows + run.answers().to_pylist(), schema=run.answers().schema)
    )
    _, page = write_report(asked.path, tmp_path / "out", FAST)
    assert re.search(says, words(page)) and "policy “baseline” too" not in words(page)


def test_a_policy_of_an_unknown_kind_is_reported(tmp_path: Path, no_figures: None) -> None:
    run = make_run(tmp_path, ["textvqa"], "baseline,cliff=6:18:6", items=20)
    extra = [
        row | {"policy": "top=8"}
        for row in run.answers().to_pylist()
        if row["policy"] == "cliff=12"
    ]
    run.append(pa.Table.from_pylist(extra, schema=run.answers().schema))
    run.extend([], [{"name": "top=8", "kind": "top", "keep": 8}])
    summary, page = write_report(run.path, tmp_path / "out", FAST)
    assert "top=8" in words(page)
    result = summary.tasks[0].result("top=8")
    assert result is not None and result.policy.layer(30) is None and result.against


def test_an_item_whose_picture_is_gone_is_still_shown(tmp_path: Path, no_figures: None) -> None:
    run = make_run(tmp_path, ["pope"], "baseline,cliff=6", items=20)
    for picture in (tmp_path / "data").rglob("*.jpg"):
        picture.unlink()
    _, page = write_report(run.path, tmp_path / "out", FAST)
    assert '<article class="card">' in page.read_text()
    assert "data:image/jpeg" not in page.read_text()


def test_answers_cannot_break_the_page(tmp_path: Path, no_figures: None) -> None:
    run = make_run(tmp_path, ["textvqa"], "baseline,cliff=6", items=12)
    evil = [
        row | {"answer": "<script>alert(1)</script>", "policy": "cliff=8"}
        for row in run.answers().to_pylist()
        if row["policy"] == "cliff=6"
    ]
    run.append(pa.Table.from_pylist(evil, schema=run.answers().schema))
    run.extend([], [{"name": "cliff=8", "kind": "cliff", "cliff": 8}])
    _, page = write_report(run.path, tmp_path / "out", FAST)
    assert "<script" not in page.read_text()
