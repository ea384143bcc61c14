"""Which tolerance a report reads a run with, and how it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.synthetic_run import make_run
from vllm_flow.cli import main


def test_the_tolerance_is_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None
) -> None:
    """What a run was begun with, unless told another; of two runs the one that both have."""
    run = make_run(tmp_path / "a", ["pope", "chair"], "baseline,cliff=6:18:6", items=12)
    other = make_run(tmp_path / "b", ["pope"], "baseline,cliff=6:18:6", items=12)

    def said(*more: str) -> str:
        assert main(["report", *more, "--resamples", "100"]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "loses no more than 1 point." in said(str(run.path))
    run.update({"tolerance": 0.0025})
    told = said(str(run.path))
    assert "loses no more than 0.25 points" in told and "nothing corrects across tasks" in told
    page = (run.path / "report" / "report.html").read_text()
    assert "tolerance 0.25 points" in page and page.count("corrects across tasks") == 2
    assert "loses no more than 3 points" in said(str(run.path), "--tolerance", "3%")
    assert "nothing corrects" not in said(str(other.path)), "of one task"
    assert main(["report", str(run.path), str(other.path)]) == 2
    assert "tolerances of 0.25 points and 1 point; say which" in capsys.readouterr().err
    assert "comparison.html" in said(str(run.path), str(other.path), "--tolerance", "1")
    run.update({"tolerance": 25})
    assert main(["report", str(run.path)]) == 2
    assert "is damaged (tolerance is 25)" in capsys.readouterr().err


@pytest.mark.parametrize("policies", ["baseline", "cliff=6,cliff=18"])
def test_a_tolerance_of_a_run_that_compares_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None, policies: str
) -> None:
    run = make_run(tmp_path / "a", ["scienceqa"], policies, items=12)
    assert main(["report", str(run.path), "--tolerance", "2%"]) == 2
    told = capsys.readouterr().err
    assert "--tolerance has no effect on a run without a baseline and another policy" in told
    assert main(["report", str(run.path), "--resamples", "100"]) == 0
    other = make_run(tmp_path / "b", ["scienceqa"], policies, items=12)
    both = [str(run.path), str(other.path), "--tolerance", "2%", "--resamples", "100"]
    assert main(["report", *both]) == 0, "two runs are compared with each other"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--resamples", "99", "'99' is no number of resamples; write one from 100 to 1000000"),
        ("--resamples", "1000001", "is no number of resamples"),
        ("--resamples", "1_000", "is no number of resamples"),
        ("--seed", "-1", "'-1' is no seed"),
        ("--seed", str(2**32), "is no seed"),
    ],
)
def test_what_draws_is_refused_by_its_own_name(
    option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", "RUN", option, value])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {option}: " in said and says in said
