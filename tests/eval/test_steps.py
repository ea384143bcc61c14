"""Tasks asked step by step: the request at a question's end is replaced, and the last line alone is scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval import files
from tests.eval.files import arguments
from tests.eval.test_choices import mme_folders
from tests.eval.test_scienceqa import official
from vllm_flow.eval.report.text import task_title
from vllm_flow.eval.sweep.run import read_task
from vllm_flow.eval.tasks import get_task, task_names
from vllm_flow.eval.tasks.base import Item, sum_counts
from vllm_flow.eval.tasks.prompts import STYLES, choose, short_answer
from vllm_flow.eval.tasks.reading import DataError
from vllm_flow.eval.tasks.steps import final_answer, step_by_step


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Two cats.\nAnswer: B", "B"),
        ("Two cats.\n\n**Answer:** B.", "B"),
        ("**Final Answer: yes**", "yes"),
        ("answer : 'a red dog'", "a red dog"),
        ("Answer: A\nWait, no.\nAnswer: C\n", "C"),
        ("The answer is B", "B"),
        ("- The final answer is: 42.5 %.", "42.5 %"),
        ("Answer:", ""),
        ("I see a cat. The sign gives no answer: it is cut off.", None),
        ("", None),
    ],
)
def test_the_last_line_is_the_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("style", STYLES)
def test_every_familys_requests_are_known(style: str) -> None:
    asked = step_by_step(short_answer("Is it red?", style))
    assert asked is not None and asked.startswith("Is it red?\nThink step by step")
    assert asked.endswith("where X is a single word or phrase.")
    asked = step_by_step(choose("Which?", ["a", "b"], style=style))
    assert asked is not None and asked.endswith("where X is the letter of the right option.")


def test_a_task_keeps_its_rule_and_gets_another_request(tmp_path: Path) -> None:
    plain, steps = get_task("scienceqa"), get_task("scienceqa-steps")
    data = official(tmp_path / "scienceqa")
    items = steps.read(data)
    assert [item.id for item in items] == [item.id for item in plain.read(data)]
    for item in items:
        assert "directly" not in item.text and "Think step by step" in item.text
        assert item.text.endswith("where X is the letter of the right option.")
    right = str(items[0].truth["answer"])
    scored = steps.score(items[0], f"It could be C. So it is none of these.\nAnswer: {right}")
    assert scored.score == 1.0 and not scored.unclear
    assert plain.score(items[0], f"It could be C.\nAnswer: {right}").score == 0.0
    lost = steps.score(items[0], f"The answer must be {right} as")
    assert lost.score == 0.0 and lost.unclear
    assert steps.metrics(sum_counts([scored, lost]))["accuracy"] == 0.5
    # Of a task whose rule takes anything, too.
    gqa, item = get_task("gqa-steps"), Item("1", "", None, {"answer": "red"}, "open")
    assert [gqa.score(item, said).unclear for said in ("It is red", "Answer: red")] == [True, False]
    assert (steps.headline, steps.binary) == (plain.headline, plain.binary)
    assert task_title(steps.name) == "ScienceQA (steps)"


def test_both_ways_in_one_run_read_one_folder(tmp_path: Path) -> None:
    official(tmp_path / "scienceqa")
    for name in ("scienceqa", "scienceqa-steps"):
        work = read_task(name, arguments(tmp_path), "llava-1.5", 1)
        assert work.task == name and len(work.items) == 1
    assert read_task("scienceqa-steps", arguments(tmp_path), "llava-1.5", 1).max_tokens == 1024


def test_pairs_stay_pairs_and_other_prompts_are_known(tmp_path: Path) -> None:
    data = mme_folders(tmp_path / "mme")
    steps = get_task("mme-steps")
    items = steps.read(data)
    assert steps.bundle(items[0]) == get_task("mme").bundle(items[0])
    scored = [steps.score(item, "A sign.\nAnswer: yes") for item in items]
    counted = sum_counts(steps.together(scored))
    assert sum(n for name, n in counted.items() if name.startswith("pictures_")) == len(items) / 2
    other = get_task("mme-steps").asked_as("qwen2-vl").read(data)
    assert all("Think step by step" in item.text for item in other)
    assert get_task("pope-steps").asked_as("qwen2-vl") == get_task("pope-steps")


def test_what_cannot_be_asked_so_is_refused(tmp_path: Path) -> None:
    files.coco(tmp_path / "chair", {"val": {7: (["dog"], ["A man and a dog."])}})
    with pytest.raises(DataError, match="cannot be asked step by step; ask chair$"):
        get_task("chair-steps").read(tmp_path / "chair")
    with pytest.raises(ValueError, match="no task 'popes-steps'"):
        get_task("popes-steps")
    assert "pope-steps" not in task_names()
