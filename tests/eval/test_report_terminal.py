"""What a report shows in a terminal of 80 columns."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from vllm_flow.eval.report.terminal import scores_table


def row(policy: str, **more: Any) -> dict[str, Any]:
    cells = dict.fromkeys(("value", "limits", "difference", "difference_limits", "corrected"), "")
    return {"policy": policy, "flips": "", "shown": False, **cells, **more}


def test_every_policy_has_its_score_and_difference_on_one_line() -> None:
    compared = dict(difference="−12.5", difference_limits="[−100.0, −10.5]", corrected="0.004")
    rows = [
        row("0:1/3 random seed=1", value="95.2", limits="[63.0, 100.0]", **compared),
        row("baseline", value="95.2", limits="[63.0, 100.0]"),
        row("cliff 4", value="82.7", limits="[60.1, 90.0]", flips="+10 −99", **compared),
        row("0:1/3 uniform", value="95.2", limits="[63.0, 100.0]", shown=True),
    ]
    view = {"title": "POPE", "items": 1, "metric": "F1", "percent": True, "rows": rows}
    told = StringIO()
    Console(file=told, width=80, highlight=False).print(scores_table(view))
    lines = [" ".join(line.split()) for line in told.getvalue().splitlines()]
    assert lines[0] == "POPE, 1 question"
    assert "policy F1, % difference p flips" in lines
    assert "baseline 95.2 [63.0, 100.0]" in lines
    assert "0:1/3 random seed=1 95.2 [63.0, 100.0] −12.5 [−100.0, −10.5] 0.004" in lines
    assert "cliff 4 82.7 [60.1, 90.0] −12.5 [−100.0, −10.5] 0.004 +10 −99" in lines
    assert "0:1/3 uniform 95.2 [63.0, 100.0]" in lines
