"""The report's banner: answers in which a task's rule finds nothing that it looks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.eval import synthetic_run
from tests.eval.test_report import FAST, words
from vllm_flow.eval.report.command import write_report

SAID = "Some answers do not say what was asked."


def page_where(
    unclear: int, policy: str, folder: Path, monkeypatch: pytest.MonkeyPatch, policies: str
) -> str:
    """The page of a run whose first so many answers under a policy name no yes and no no."""
    row, left = synthetic_run.row, [unclear]

    def spoilt(task: str, item: Any, asked: Any, *rest: Any) -> dict[str, Any]:
        found = row(task, item, asked, *rest)
        if asked.name == policy and left[0]:
            left[0] -= 1
            found["answer"] = "a dog on a sofa"
        return found

    monkeypatch.setattr(synthetic_run, "row", spoilt)
    monkeypatch.setattr("vllm_flow.eval.report.figures.draw_all", lambda *_: {})
    run = synthetic_run.make_run(folder, ["pope"], policies, 20)
    return words(write_report(run.path, run.path / "report", FAST)[1])


@pytest.mark.parametrize(
    ("policies", "policy"), [("baseline,cliff=6", "baseline"), ("cliff=6,cliff=12", "cliff=6")]
)
def test_the_banner_counts_the_baselines_or_else_the_first_policys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: str, policy: str
) -> None:
    shown = page_where(3, policy, tmp_path, monkeypatch, policies)
    assert SAID in shown
    title = "Baseline" if policy == "baseline" else "Cliff 6"
    assert re.search(
        rf"{title}: answers that say neither yes nor no .*: 3 of \d+", shown, re.IGNORECASE
    )


@pytest.mark.parametrize(("count", "policy"), [(0, "baseline"), (3, "cliff=6")])
def test_there_is_no_banner_where_the_baseline_is_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, policy: str
) -> None:
    """What a cliff does to answers is what is measured, and no doubt about the measure."""
    assert SAID not in page_where(count, policy, tmp_path, monkeypatch, "baseline,cliff=6")
