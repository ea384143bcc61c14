"""The exit status of `vllm-flow eval`, by which a script tells a whole run from one with holes; no engine."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from vllm_flow import cli
from vllm_flow.eval.sweep import driver, run
from vllm_flow.eval.sweep.records import Run, RunError


def status(monkeypatch: pytest.MonkeyPatch, does: Any, *more: str) -> int:
    def evaluate(args: Namespace) -> int:
        if isinstance(does, Exception):
            raise does
        return does

    monkeypatch.setattr(run, "evaluate", evaluate)
    asked = ["eval", "--model", "m", "--tasks", "pope", "--data", "d", "--policies", "baseline"]
    return cli.main([*asked, "--out", "/nowhere/run", *more])


@pytest.mark.parametrize(
    ("does", "more", "expected", "says"),
    [
        (0, [], 0, ""),
        (5, [], 3, "5 rows are errors, so the exit status is 3: --retry-errors asks them again"),
        (5, ["--errors-ok"], 0, ""),
        (driver.SweepError("no engine"), [], 1, "no engine"),
        (driver.SweepError("no engine"), ["--errors-ok"], 1, "no engine"),
        (RunError("no run"), [], 2, "no run"),
    ],
)
def test_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    does: Any,
    more: list[str],
    expected: int,
    says: str,
) -> None:
    assert status(monkeypatch, does, *more) == expected
    errors = capsys.readouterr().err
    assert says in errors if says else not errors


def test_help_says_what_a_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    said = capsys.readouterr().out
    assert "Exit status: 0 when every question has an answer" in said and "--errors-ok" in said


def test_errors_are_counted_over_the_tasks_and_policies_asked(tmp_path: Path) -> None:
    made = Run.create(tmp_path / "run", {})
    rows = [
        {"task": task, "item_id": "1", "policy": policy, "error": "bad"}
        for task, policy in (("pope", "baseline"), ("pope", "cliff=2"), ("chair", "baseline"))
    ]
    made.append([*rows, {"task": "pope", "item_id": "2", "policy": "baseline", "answer": "Yes"}])
    baseline, cliff = run.parse_policies("baseline,cliff=2", 6)
    assert run.report(made, ["pope"], [baseline]) == 1
    assert run.report(made, ["pope"], [baseline, cliff]) == 2
    assert run.report(made, ["chair", "pope"], [baseline, cliff]) == 3
