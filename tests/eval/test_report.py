"""The report: its figures, tables and page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.eval.pages import rows, words
from tests.eval.synthetic_run import make_run
from vllm_flow.cli import main
from vllm_flow.eval.report import text
from vllm_flow.eval.report.command import write_report
from vllm_flow.eval.report.results import Options, Summary
from vllm_flow.eval.sweep.records import Run

FAST = Options(resamples=100, swaps=199)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Summary, Path]:
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder, ["pope", "chair"], "baseline,cliff=0:30:6,downsample=12", failures=0.02)
    summary, page = write_report(run.path, run.path / "report", FAST)
    return run, summary, page


def test_all_files_are_there_and_pictures_open(written: tuple[Run, Summary, Path]) -> None:
    _, _, page = written
    names = {path.name for path in page.parent.iterdir()}
    figures = {"scores", "differences", "tradeoff", "savings", "cost"}
    tables = {"scores", "savings", "items", "errors", "cost", "contests"}
    assert names == (
        {"report.html"}
        | {f"{n}.{e}" for n in figures for e in ("png", "svg")}
        | {f"{n}.csv" for n in tables}
    )
    for name in figures:
        with Image.open(page.parent / f"{name}.png") as image:
            assert image.width > 700
            assert image.convert("L").getextrema()[0] < 120, "something dark is drawn"


def test_figure_5_is_drawn_from_the_run(
    written: tuple[Run, Summary, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Headline scores of the policies that are a cliff, from text only to the baseline."""
    run, summary, _ = written
    assert main(["figures", str(run.path), "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "scores.png") as image:
        assert image.width > 700
    drawn = rows(tmp_path / "scores.csv")
    assert [row["layer"] for row in drawn] == 2 * ["0", "6", "12", "18", "24", "30"]
    assert {row["line"] for row in drawn} == {"pope, f1", "chair, chair_i"}
    for row in drawn:
        (task,) = (task for task in summary.tasks if task.name == row["line"].split(",")[0])
        (value,) = (
            result.values[task.headline].value
            for result in task.policies
            if result.policy.kind != "downsample"
            and result.policy.layer(summary.num_layers) == int(row["layer"])
        )
        assert float(row["score"]) == pytest.approx(value, rel=1e-5)


def test_figures_of_a_run_without_report_say_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, ["pope"], "baseline,cliff=6")
    assert main(["figures", str(run.path)]) == 1
    assert f"vllm-flow report {run.path}` first" in capsys.readouterr().err


def test_the_page_asks_for_nothing_from_outside(written: tuple[Run, Summary, Path]) -> None:
    source = written[2].read_text()
    assert "<script" not in source and "@import" not in source
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>]+)""", source)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    anchors = set(re.findall(r'href="#([^"]+)"', source))
    assert anchors <= set(re.findall(r'id="([^"]+)"', source))


def test_the_page_says_the_summarys_numbers(written: tuple[Run, Summary, Path]) -> None:
    run, summary, page = written
    shown = words(page)
    for task in summary.tasks:
        assert text.task_title(task.name) in shown
        for result in task.policies:
            assert text.number(result.values[task.headline].value) in shown
            if task.headline in result.against:
                compared = result.against[task.headline]
                assert text.limits(compared.comparison.difference, sign=True) in shown
                assert text.p_text(compared.p_corrected) in shown
        assert text.cliff_text(task.cliff, 0.01) in shown
    assert "Not a benchmark’s data" in shown and "POPE-style" in shown
    for version in run.meta["versions"].values():
        assert version in shown


def test_errors_are_counted_with_their_reasons(written: tuple[Run, Summary, Path]) -> None:
    run, _, page = written
    failed = [row for row in run.answers().to_pylist() if row["error"]]
    assert f"{len(failed)} requests ended in an error" in words(page)
    assert "EngineDeadError: the engine stopped" in words(page)
    assert sum(int(row["requests"]) for row in rows(page.parent / "errors.csv")) == len(failed)


def test_tables_hold_the_summary(written: tuple[Run, Summary, Path]) -> None:
    run, summary, page = written
    table = rows(page.parent / "scores.csv")
    assert len(table) == sum(len(r.values) for t in summary.tasks for r in t.policies)
    for task in summary.tasks:
        for result in task.policies:
            line = next(
                row
                for row in table
                if (row["task"], row["policy"]) == (task.name, result.policy.name)
                and row["headline"] == "True"
            )
            assert float(line["value"]) == result.values[task.headline].value
            counts = ("answered", "failed", "missing", "paired")
            assert [int(line[name]) for name in counts] == [getattr(result, n) for n in counts]
            if task.headline in result.against:
                compared = result.against[task.headline]
                c = compared.comparison
                assert float(line["difference"]) == c.difference.value
                assert float(line["baseline_on_pairs"]) == c.baseline.value
                assert float(line["value_on_pairs"]) == c.treatment.value
                assert float(line["p_holm"]) == compared.p_corrected
                assert (int(line["gained"]), int(line["lost"])) == (result.gained, result.lost)
    answered = [row for row in run.answers().to_pylist() if row["answer"] is not None]
    for line in table:
        own = [r for r in answered if (r["task"], r["policy"]) == (line["task"], line["policy"])]
        cut = sum(row["finish_reason"] == "length" for row in own)
        assert int(line["cut_off"]) == cut and (cut > 0) == (line["task"] == "chair")
        tokens = sum(row["output_tokens"] for row in own) / len(own)
        assert float(line["answer_tokens"]) == pytest.approx(tokens)
    # The page tells lengths where answers are long, or are cut off.
    sections = page.read_text(encoding="utf-8").partition("Every policy")[2]
    pope_part, chair_part = re.split('<h3 id="(?:pope|chair)">', sections)[1:3]
    assert "cut off" in chair_part and "cut off" not in pope_part
    items = rows(page.parent / "items.csv")
    assert len(items) == len(answered)
    accuracy = [
        float(r["score"]) for r in items if (r["task"], r["policy"]) == ("pope", "baseline")
    ]
    pope = next(t for t in summary.tasks if t.name == "pope")
    assert sum(accuracy) / len(accuracy) == pytest.approx(
        pope.policies[0].values["accuracy"].value, abs=0.02
    )
    everything = [row for row in rows(page.parent / "savings.csv") if row["task"] == "*"]
    assert [row["policy"] for row in everything] == [s.policy for s in summary.savings]


def test_flipped_answers_are_shown_with_their_pictures(written: tuple[Run, Summary, Path]) -> None:
    source = written[2].read_text()
    section = source[source.index("Answers that flipped") :]
    cards = section.count('<article class="card">')
    assert cards >= 6
    assert section.count("data:image/jpeg;base64,") == cards
    assert "Lost:" in section and "Gained:" in section


def test_the_same_run_gives_the_same_files(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["scienceqa"], "baseline,cliff=0:30:10", items=20)
    for name in ("once", "again"):
        write_report(run.path, tmp_path / name, FAST)
    for path in (tmp_path / "once").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None) -> None:
    run = make_run(tmp_path, ["pope", "chair"], "baseline,cliff=6:18:6", items=12)
    assert main(["report", str(run.path), "--tolerance", "2", "--resamples", "100"]) == 0
    printed = capsys.readouterr().out
    assert "POPE" in printed and "CHAIR" in printed
    said = " ".join(printed.split())
    assert "Too few questions" in said and "that it loses no more than 2 points" in said
    assert (run.path / "report" / "report.html").exists()


def test_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err
    Run.create(tmp_path / "empty", {"tasks": ["pope"], "policies": []})
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "nothing to report" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path / "empty"), "--tolerance", "-1"])
