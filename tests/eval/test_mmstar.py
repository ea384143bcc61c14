"""MMStar: the parse rule case by case, the layout, the mean over all questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval import files
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import Item, sum_counts
from vllm_flow.eval.tasks.mmstar import CATEGORIES, parse_choice
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError

TASK = get_task("mmstar")

RIGHT = [
    "B", "b", " B", "B ", "\nB\n", "B.", "B. x", "B: x", "B) x", "Bananas", "b or c", "BC", "(B)", "(b", "(B) x",
    "Option B", "option b", "OPTION B: x", "Option B.", "Option Banana", "The answer is B", "the answer is b.",
    "THE ANSWER IS B", "The answer is Bad", " (B)", "\tOption B", "option\nb", "the answer\nis b", "B\nA", "b!",
]  # fmt: skip
WRONG = [
    "", " ", "A", "C", "a", "(A)", "( B)", "((B))", "Option A", "Option  B", "Option: B", "Option", "option ", "(",
    "The answer is", "The answer is ", "The answer is A", "The answer is  B", "The answer is: B",
    "The answer is (B)", "The answer is option B", "Answer: B", "A cat", "A. B", "An answer: B", "'B'", "**B**",
    "[B]", "-B", "1", "2", "It is B", "D", "E", "answer is b", "Ⓑ", "optionb", "the answer isb", "C. (B)",
]  # fmt: skip


@pytest.mark.parametrize("answer", ["B", "b", " B\n"])
@pytest.mark.parametrize("text", RIGHT)
def test_right(text: str, answer: str) -> None:
    assert TASK.score(Item("1", "", None, {"answer": answer}, "math"), text).score == 1.0


@pytest.mark.parametrize("text", WRONG)
def test_wrong(text: str) -> None:
    assert TASK.score(Item("1", "", None, {"answer": "B"}, "math"), text).score == 0.0


@pytest.mark.parametrize("text", RIGHT + WRONG)
def test_the_rule_case_by_case(text: str) -> None:
    """The published comparisons, one after another, for every possible answer."""
    said = text.lower().strip().replace("\n", " ")
    for answer in "abcd":
        right = (
            said[:1] == answer
            or (said[:1] == "(" and said[1:2] == answer)
            or (said[:7] == "option " and said[7:8] == answer)
            or (said[:14] == "the answer is " and said[14:15] == answer)
        )
        assert (parse_choice(text) == answer) == right


def rows() -> list[dict]:
    return [
        {
            "index": n,
            "question": f"Q{n}? \nOptions: A: x, B: y",
            "answer": "B",
            "category": category,
            "l2_category": "x",
            "image": files.png((n, 0, 0)),
        }
        for n, category in enumerate([*CATEGORIES, "math"])
    ]


def test_layout_and_metrics(tmp_path: Path) -> None:
    files.parquet(tmp_path / "mmstar.parquet", rows())
    items = TASK.read(tmp_path)
    assert items[1].text == (
        "Q1? \nOptions: A: x, B: y\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [load_image(item.image).getpixel((0, 0))[0] for item in items] == list(range(7))
    scored = [TASK.score(item, "B" if item.id in "06" else "A") for item in items]
    metrics = TASK.metrics(sum_counts(scored))
    assert metrics["accuracy"] == pytest.approx(2 / 7)
    assert metrics["accuracy_coarse_perception"] == 1.0
    assert metrics["accuracy_math"] == 0.5
    assert metrics["accuracy_science_technology"] == 0.0


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither mmstar.parquet"):
        TASK.read(tmp_path)
    files.parquet(tmp_path / "mmstar.parquet", [rows()[0] | {"category": "maths"}])
    with pytest.raises(DataError, match="row 0: unknown category 'maths'"):
        TASK.read(tmp_path)
