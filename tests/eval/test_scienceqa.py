"""ScienceQA: the parse rule case by case, prompts to the letter, both layouts, the two accuracies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import files
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import Item, sum_counts
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError
from vllm_flow.eval.tasks.scienceqa import parse_letter, question_text, unanswered

TASK, FULL = get_task("scienceqa"), get_task("scienceqa-full")

LETTERS = [
    # Exactly one of A to E.
    ("A", "A"), ("B", "B"), ("C", "C"), ("D", "D"), ("E", "E"), ("F", None), ("Z", None), ("a", None),
    ("e", None), ("", None), (" ", None), (" A", None), ("A ", None), ("A\n", None), ("\nA", None),
    ("A.", None), ("(A)", None), ("AB", None), ("ABC", None), ("1", None), ("Α", None), ("Ａ", None),
    # A letter, a full stop, a space.
    ("A. ", "A"), ("A. x", "A"), ("B. The moon", "B"), ("E. ", "E"), ("C.  two", "C"), ("D. A. B", "D"),
    ("F. x", None), ("a. x", None), ("A.x", None), ("A.", None), ("A.\n", None), ("A.\tx", None),
    ("A .", None), ("A, x", None), ("A) x", None), ("A: x", None), (" A. x", None), ("AA. x", None),
    ("A.. x", None), ("A.\u00a0x", None), ("A. The answer is B.", "A"), ("(A. x", None), ("A- x", None),
    ("B. The answer is C. The answer is D.", "B"), ("E. \n", "E"), ("A. .", "A"), ("G. The answer is B.", "B"),
    # The sentence, once, with any character behind the letter.
    ("The answer is A.", "A"), ("The answer is B", None), ("The answer is C ", "C"), ("The answer is D,", "D"),
    ("The answer is E!", "E"), ("The answer is F.", "F"), ("The answer is Z.", "Z"), ("The answer is A\n", None),
    ("The answer is A\n.", None), ("The answer is a.", None), ("the answer is A.", None),
    ("The Answer is A.", None), ("The answer is  A.", None), ("The answer is: A.", None),
    ("The answer is (A).", None), ("The answer is AB", "A"), ("The answer is Apple", "A"),
    ("The answer is The moon.", "T"), ("The answer is Banana", "B"), ("The answer is banana.", None),
    ("So. The answer is B.", "B"), ("The answer is B. Because", "B"), ("xThe answer is B.", "B"),
    ("The answer is A. The answer is A.", None), ("The answer is A. The answer is B.", None),
    ("The answer is A The answer is B", "A"), ("The answer is AThe answer is B.", "A"),
    ("The answer is A\nThe answer is B.", "B"), ("The answer is A. the answer is B.", "A"),
    ("BECAUSE: x. The answer is D.", "D"), ("The answer is option A.", None), ("The answer is \"A\".", None),
    ("The answer is A\u2028", "A"), ("The answer is A\r", "A"), ("The answer is É.", None),
    ("The answer is 1.", None), ("Answer: A", None), ("Answer: The answer is C.", "C"), ("A is right", None),
    ("I think A", None), ("Option A", None), ("A or B", None), ("none", None), ("Both A and B", None),
    ("The answer is A. A", "A"), ("C, The answer is D.", "D"), ("C The answer is D.", "D"),
    ("**A**", None), ("A;", None), ("A. The", "A"), ("D. ", "D"), ("E.", None), ("E.  ", "E"),
    ("The answer is A.The answer is B", "A"), ("The answer is A.The answer is B.", None),
    ("The answer isA.", None), ("The answers is A.", None), ("The answer is A" + "." * 50, "A"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_letters(text: str, letter: str | None) -> None:
    assert parse_letter(text) == letter


def by_hand(text: str) -> str | None:
    """The rule again, by positions."""
    if any(text == letter for letter in "ABCDE"):
        return text
    if len(text) >= 3 and any(text.startswith(letter + ". ") for letter in "ABCDE"):
        return text[0]
    lead, found, i = "The answer is ", [], 0
    while (i := text.find(lead, i)) >= 0:
        tail = text[i + len(lead) : i + len(lead) + 2]
        if re.fullmatch("[A-Z][^\n]", tail):
            found.append(tail[0])
            i += len(lead) + 2
        else:
            i += 1
    return found[0] if len(found) == 1 else None


@given(
    st.lists(
        st.sampled_from(["The answer is ", "A", "B", ". ", ".", " ", "\n", "F", "a", "the"]),
        max_size=8,
    ).map("".join)
)
def test_the_rule_by_positions(text: str) -> None:
    assert parse_letter(text) == by_hand(text)


@pytest.mark.parametrize("letter", "ABCDEZ")
@pytest.mark.parametrize("choices", [2, 3, 4, 5])
@pytest.mark.parametrize("answer", [0, 1])
def test_a_letter_beyond_the_choices_is_wrong(
    tmp_path: Path, letter: str, choices: int, answer: int
) -> None:
    files.json_file(
        tmp_path / "problems.json",
        {"1": problem(answer, None) | {"choices": [f"choice {n}" for n in range(choices)]}},
    )
    files.json_file(tmp_path / "pid_splits.json", {"test": ["1"]})
    scored = FULL.score(FULL.read(tmp_path)[0], f"The answer is {letter}.")
    assert scored.score == float(letter == "ABCDE"[answer])


def test_prompt() -> None:
    assert question_text("Which?", ["x", "y z"], "") == (
        "Which?\nA. x\nB. y z\nAnswer with the option's letter from the given choices directly."
    )
    assert question_text("Which?", ["x"], "A hint.\nMore") == (
        "Context: A hint.\nMore\nWhich?\nA. x\n"
        "Answer with the option's letter from the given choices directly."
    )


def problem(answer: int, image: str | None, hint: str = "") -> dict:
    return {
        "question": f"Q{answer}?",
        "choices": ["one", "two", "three"],
        "answer": answer,
        "hint": hint,
        "image": image,
        "lecture": "",
        "solution": "",
        "split": "test",
    }


PROBLEMS = {
    "4": problem(0, "image.png"),
    "11": problem(1, None, "Look."),
    "5": problem(2, "image.png"),
    "6": problem(0, None),
}


def official(folder: Path) -> Path:
    files.json_file(folder / "problems.json", PROBLEMS)
    files.json_file(folder / "pid_splits.json", {"test": ["11", "4", "5"], "val": ["6"]})
    return folder


@pytest.mark.parametrize("base", [".", "data/scienceqa"])
@pytest.mark.parametrize("images", [".", "images"])
def test_official_layout(tmp_path: Path, base: str, images: str) -> None:
    folder = official(tmp_path / base)
    files.image_file(folder / images / "test/4/image.png", (4, 4, 4))
    items = FULL.read(tmp_path)
    assert [item.id for item in items] == ["11", "4", "5"]
    assert items[0].image is None
    assert items[0].text.startswith("Context: Look.\nQ1?\nA. one\n")
    assert load_image(items[1].image).getpixel((0, 0)) == (4, 4, 4)
    assert items[2].image.endswith("test/5/image.png"), (
        "a missing picture is not the reader's matter"
    )
    assert [item.id for item in TASK.read(tmp_path)] == ["4", "5"]


def test_hub_layout(tmp_path: Path) -> None:
    rows = [
        {key: value for key, value in p.items() if key != "split"}
        | {"image": files.hub_image((n, 0, 0)) if p["image"] else None}
        for n, p in enumerate(PROBLEMS.values())
    ]
    files.parquet(tmp_path / "ScienceQA-FULL/test-00000-of-00001.parquet", rows)
    files.parquet(tmp_path / "ScienceQA-IMG/test-00000-of-00001.parquet", [rows[0], rows[2]])
    assert [item.id for item in TASK.read(tmp_path)] == ["row/0", "row/1"]
    full = FULL.read(tmp_path)
    assert [item.image is None for item in full] == [False, True, False, True]
    assert load_image(full[2].image).getpixel((0, 0)) == (2, 0, 0)
    assert [item.truth["answer"] for item in full] == ["A", "B", "C", "A"]
    assert full[0].picture_of != full[2].picture_of and full[1].picture_of == "item row/1"
    with pytest.raises(DataError, match="needs ScienceQA-FULL"):
        FULL.read(tmp_path / "ScienceQA-IMG")
    assert len(TASK.read(tmp_path / "ScienceQA-FULL")) == 2


def test_questions_about_one_picture_belong_together_in_the_official_files(tmp_path: Path) -> None:
    """Which have a file for each of them."""
    numbers = ["1", "2", "3", "4"]
    files.json_file(tmp_path / "problems.json", {n: problem(0, "image.png") for n in numbers})
    files.json_file(tmp_path / "pid_splits.json", {"test": numbers})
    for n in numbers[:3]:
        files.image_file(tmp_path / "images/test" / n / "image.png", (int(n) // 3, 0, 0))
    items = TASK.read(tmp_path)
    assert len({item.image for item in items}) == 4
    first = items[0].picture_of
    assert [item.picture_of == first for item in items] == [True, True, False, False]
    assert len({item.picture_of for item in items}) == 3
    assert items[3].picture_of == items[3].image  # a file that is not there


def test_questions_about_one_picture_belong_together_on_the_hub(tmp_path: Path) -> None:
    rows = [
        {key: value for key, value in problem(0, None).items() if key != "split"}
        | {"image": files.hub_image((n // 2, 0, 0))}
        for n in range(4)
    ]
    files.parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    items = TASK.read(tmp_path)
    assert len({item.image for item in items}) == 4
    assert [item.picture_of == items[0].picture_of for item in items] == [True, True, False, False]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither problems.json"):
        TASK.read(tmp_path)
    official(tmp_path)
    files.json_file(tmp_path / "pid_splits.json", {"test": ["4", "99"]})
    with pytest.raises(DataError, match="no problem 99"):
        TASK.read(tmp_path)
    files.json_file(tmp_path / "pid_splits.json", {"val": ["4"]})
    with pytest.raises(DataError, match="no split 'test'; there are val"):
        TASK.read(tmp_path)
    (tmp_path / "pid_splits.json").unlink()
    with pytest.raises(DataError, match=r"pid_splits.json: no such file"):
        TASK.read(tmp_path)
    files.json_file(tmp_path / "pid_splits.json", {"test": ["4"]})
    files.json_file(tmp_path / "problems.json", {"4": problem(3, None)})
    with pytest.raises(DataError, match="problem 4: answer 3 of 3 choices"):
        TASK.read(tmp_path)
    files.json_file(tmp_path / "problems.json", {"4": problem(1, None) | {"image": 5}})
    with pytest.raises(DataError, match="problem 4: 'image' is 5, not text"):
        TASK.read(tmp_path)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([None, "A", "B", "x"])), max_size=40))
def test_two_accuracies(cases: list[tuple[bool, str | None]]) -> None:
    """A missing answer is wrong overall and no part of the IMG accuracy."""
    scored = []
    for n, (has_image, text) in enumerate(cases):
        item = Item(str(n), "", None, {"answer": "A", "has_image": has_image})
        scored.append(unanswered(item) if text is None else TASK.score(item, text))
    metrics = TASK.metrics(sum_counts(scored))
    right = [text == "A" for _, text in cases]
    pictured = [text == "A" for has_image, text in cases if has_image and text is not None]
    assert metrics["accuracy"] == (sum(right) / len(right) if right else 0.0)
    assert metrics["img_accuracy"] == (sum(pictured) / len(pictured) if pictured else 0.0)
