"""Numbers, names and verdicts as the report words them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flow.eval.report import text
from vllm_flow.eval.report.examples import truth_lines
from vllm_flow.eval.report.page import settings
from vllm_flow.eval.report.results import Compared, Options, Policy
from vllm_flow.eval.statistics.bootstrap import Comparison
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.eval.statistics.verdicts import FoundCliff, Verdict


@pytest.mark.parametrize(
    "value, share, expected",
    [(0.0321, True, "+3.2"), (-0.5, True, "−50.0"), (0.0001, True, "0.0"), (-0.0001, True, "0.0"),
     (1.25, False, "+1.25")],
)  # fmt: skip
def test_signed(value: float, share: bool, expected: str) -> None:
    assert text.signed(value, share) == expected


@pytest.mark.parametrize(
    "name, title",
    [("pope", "POPE"), ("textvqa-no-ocr", "TextVQA (no ocr)"), ("my-task", "my-task")],
)
def test_task_titles(name: str, title: str) -> None:
    assert text.task_title(name) == title


@pytest.mark.parametrize(
    ("tolerance", "share", "expected"),
    [(0.01, True, "1 point"), (0.0025, True, "0.25 points"), (0.0001, True, "0.01 points"),
     (0.07, True, "7 points"), (0.25, False, "0.25 units"), (0.01, False, "0.01 units")],
)  # fmt: skip
def test_a_tolerance_is_told_as_it_was_given(tolerance: float, share: bool, expected: str) -> None:
    assert text.tolerance_text(tolerance, share) == expected
    given = compared(0.0, 0.0, 1, 1, finding="none", within_tolerance=True)
    assert text.verdict_text(given, tolerance, share).endswith(
        f"±{text.exact(tolerance, share)} {text.unit(share)}"
    )


def test_metric_titles() -> None:
    named = [text.metric_title(m) for m in ("f1", "f1_random", "yes_ratio", "chair_i")]
    assert named == ["F1", "F1 random", "yes ratio", "CHAIR_i"]
    assert text.policy_title(Policy("text-only", "text-only", 0)) == "text only"


def compared(value: float, half: float, p: float, corrected: float, **verdict: Any) -> Compared:
    difference = Interval(value, value - half, value + half)
    comparison = Comparison(difference, difference, difference, p, half / 2, False)
    return Compared(comparison, corrected, 0.03, Verdict(**verdict))


@pytest.mark.parametrize(
    "given, expected",
    [
        (compared(-0.05, 0.01, 0, 0.001, finding="worse", within_tolerance=False), "worse by 5.0"),
        (compared(0.0, 0.005, 1, 1, finding="none", within_tolerance=True),
         "no difference found; within ±1 points"),
        (compared(0.0, 0.02, 1, 1, finding="none", within_tolerance=False),
         "no difference found; ±3.0 or more would likely show"),
        (compared(-0.04, 0.02, 0.01, 0.2, finding="none", within_tolerance=False),
         "worse by 4.0, but not beyond chance after correction"),
        (compared(0.0, 0.02, 1, 1, finding="identical", within_tolerance=False),
         "every answer scored the same; ±3.0 or more would likely show"),
        (replace(compared(0.0, 0.9, 1, 1, finding="none", within_tolerance=False), detectable=1.8),
         "no difference found; too few questions to show any"),
    ],
)  # fmt: skip
def test_verdicts_in_words(given: Compared, expected: str) -> None:
    assert text.verdict_text(given, 0.01) == expected


def test_cliffs_in_words() -> None:
    def both(found: int | None, seen: int | None, shown: int | None) -> tuple[str, str]:
        cliff = FoundCliff(found, shown, 0.01, (4, 8, 12), seen)
        return text.cliff_headline(cliff), text.cliff_text(cliff, 0.01)

    assert both(8, 8, 8) == (
        "cliff 8", "From cliff 8 on it is shown that no more than 1 point is lost.",
    )  # fmt: skip
    headline, said = both(4, 8, 12)
    assert headline == "cliff 12" and "shown that no more" in said
    assert said.endswith("No larger loss was seen, and none found, from cliff 8 on.")
    headline, said = both(4, 8, None)
    assert headline == "too few questions" and said.startswith("Too few questions to show")
    assert "from cliff 8 on" in said and "cliff 4" not in said, "30 points may be lost there"
    headline, said = both(4, None, None)
    assert headline == "too few questions"
    assert said.endswith("A larger loss is seen even at the deepest one, 12.")
    headline, said = both(None, None, None)
    assert headline.startswith("none") and "found even at the deepest cliff asked, 12" in said
    assert text.cliff_headline(None) == "none asked"
    assert "no cliff to compare" in text.cliff_text(None, 0.01)


def test_settings_are_readable() -> None:
    session = {"started": "today", "command": ["vllm-flow", "eval"], "engines": 2}
    meta = {
        "command": ["vllm-flow", "eval"],
        "num_layers": 30,
        "versions": {},
        "sessions": [session],
    }
    assert settings(meta) == [("command", "vllm-flow eval"), ("num layers", "30"), ("policies", "")]
    assert settings(meta | {"sessions": [session] * 2})[-1] == (
        "session 2",
        "today; vllm-flow eval; 2",
    )


def test_truths_are_short() -> None:
    lines = truth_lines({"answers": ["a"] * 9 + ["b"], "question_id": 3, "label": "yes"})
    assert lines == [("answers", "a ×9, b"), ("label", "yes")]


def test_the_cells_of_a_comparison_say_which_number_is_which() -> None:
    """Answers gained stand before answers lost, and the p value of a row is the corrected one."""
    against = compared(-0.05, 0.01, 0.002, 0.03, finding="worse", within_tolerance=False)
    result: Any = SimpleNamespace(gained=2, lost=7, mcnemar_p=0.18)
    task: Any = SimpleNamespace(higher_is_better=True)
    found = text.compared(against, result, True, task, Options())
    assert (found["flips"], found["difference"]) == ("+2 −7", "−5.0")
    assert (found["p"], found["corrected"], found["mcnemar"]) == ("0.002", "0.030", "0.18")
    assert found["verdict"].startswith("worse by 5.0") and found["finding"] == "worse"
