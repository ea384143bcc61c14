"""Where a figure draws a sweep's cliffs: never through a loss that anybody can see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.eval.synthetic_run import make_run
from vllm_flow.eval.report.command import read_tasks
from vllm_flow.eval.report.figures import scores
from vllm_flow.eval.report.results import Options, TaskResult
from vllm_flow.eval.report.summary import summarise

matplotlib = pytest.importorskip("matplotlib")


def read(path: Path, items: int) -> TaskResult:
    run = make_run(path, ["scienceqa"], "baseline,cliff=0:30:6", items=items)
    found, tasks, _ = read_tasks(run)
    answers = run.answers().to_pylist()
    return summarise(run.meta, found, answers, tasks, Options(resamples=200, swaps=99)).tasks[0]


def marks(task: TaskResult) -> tuple[list[float], list[str]]:
    """Where vertical lines stand, and what is written below the panel: in it, it would hide a curve."""
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    scores(axis, task, 30)
    lines = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
    assert not axis.texts
    return lines, axis.get_xlabel().splitlines()[1:]


def test_no_line_crosses_a_visible_loss(tmp_path: Path) -> None:
    """Twelve questions: half the answers are lost at cliff 0, and no test finds it after correction."""
    task = read(tmp_path, 12)
    assert task.cliff is not None
    lines, written = marks(task)
    for at in lines:
        result = next(r for r in task.policies if r.policy.layer(30) == at and r.against)
        difference = result.against[task.headline].comparison.difference.value
        assert difference >= -task.cliff.tolerance
    assert task.cliff.too_few and any("too few questions" in text for text in written)
    sure = replace(task.cliff, found=6, seen=12, shown=18)
    lines, written = marks(replace(task, cliff=sure))
    assert lines == [18, 12] and not written
    same = replace(task.cliff, found=6, seen=18, shown=18)
    assert marks(replace(task, cliff=same))[0] == [18]
