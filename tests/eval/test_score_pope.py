"""`vllm-flow score pope`: how one answer file joins three label files, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.eval import files
from tests.eval.conftest import Command

CATEGORIES = ("random", "popular", "adversarial")


# POPE. Says yes to everything but knives and persons: F1 of random 4/6, of the others 4/5.
def says(question: str) -> str:
    return "No, there is not." if "knife" in question or "person" in question else "Yes"


def pope_answers(labels: Path, of: str, /, **more: Callable[[dict], object]) -> list[dict]:
    path = labels / f"coco_pope_{of}.json"
    return [
        {"question_id": row["question_id"], "text": says(row["text"])}
        | {key: value(row) for key, value in more.items()}
        for row in map(json.loads, path.read_text().splitlines())
    ]


def prompt(row: dict) -> str:
    return row["text"] + "\nAnswer the question using a single word or phrase."


def check_pope(scores: dict) -> None:
    assert scores["task"] == "pope"
    metrics = scores["metrics"]
    assert metrics["f1_random"] == pytest.approx(2 / 3)
    assert metrics["f1_popular"] == metrics["f1_adversarial"] == pytest.approx(4 / 5)
    assert metrics["f1"] == pytest.approx((2 / 3 + 8 / 5) / 3)
    assert metrics["accuracy"] == pytest.approx((0.5 + 0.75 + 0.75) / 3)
    assert metrics["yes_ratio"] == pytest.approx((1 + 0.75 + 0.75) / 3)
    assert len(scores["items"]) == 12
    assert scores["items"][11] == {
        "id": "adversarial/4", "parsed": "no", "score": 1.0, "group": "adversarial",
    }  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_pope_blocks_in_any_order(command: Command, labels: Path, order: tuple[int, ...]) -> None:
    """One file, ids counted from 1 in each block, only the prompts to tell the categories."""
    rows = [r for n in order for r in pope_answers(labels, CATEGORIES[n], prompt=prompt)]
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    check_pope(command.scores("pope", "--labels", labels, "--answers", path))
    for text in ("POPE", "adversarial", "66.67", "80.00", "75.56", "mean"):
        assert text in command.output


def test_pope_ids_that_run_over_all(command: Command, labels: Path) -> None:
    rows = [r for c in CATEGORIES for r in pope_answers(labels, c, prompt=prompt)]
    rows = [row | {"question_id": n} for n, row in enumerate(rows, start=1)]
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    check_pope(command.scores("pope", "--labels", labels, "--answers", path))


def test_pope_categories_told_in_the_answers(command: Command, labels: Path) -> None:
    rows = [r for c in CATEGORIES for r in pope_answers(labels, c, category=lambda _, c=c: c)]
    random.Random(0).shuffle(rows)
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    check_pope(command.scores("pope", "--labels", labels, "--answers", path))


def test_pope_label_files_with_ids_of_their_own(command: Command, labels: Path) -> None:
    rows = []
    for n, category in enumerate(CATEGORIES):
        path = labels / f"coco_pope_{category}.json"
        own = [json.loads(line) for line in path.read_text().splitlines()]
        files.json_lines(path, [row | {"question_id": row["question_id"] + 10 * n} for row in own])
        rows += pope_answers(labels, category)
    random.Random(2).shuffle(rows)
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    scores = command.scores("pope", "--labels", labels, "--answers", path)
    assert scores["metrics"]["f1"] == pytest.approx((2 / 3 + 8 / 5) / 3)


def test_pope_with_llavas_question_file(command: Command, labels: Path) -> None:
    """Shuffled answers with ids of their own, and nothing but the question file to join them."""
    number, questions, answers = 10_000_000, [], []
    for category in ("adversarial", "popular", "random"):
        for line in (labels / f"coco_pope_{category}.json").read_text().splitlines():
            row, number = json.loads(line), number + 7
            questions.append(
                {
                    "question_id": number,
                    "image": row["image"],
                    "text": prompt(row),
                    "category": category,
                }
            )
            answers.append(
                {"question_id": number, "prompt": prompt(row), "text": says(row["text"])}
            )
    random.Random(1).shuffle(answers)
    asked = files.json_lines(command.folder / "llava_pope_test.jsonl", questions)
    given = files.json_lines(command.folder / "answers.jsonl", answers)
    call = ("pope", "--labels", labels, "--answers", given, "--questions", asked)
    check_pope(command.scores(*call))
    files.json_lines(given, answers[:-1])
    assert "3 answers for 4 questions" in command.refuses(*call)
    files.json_lines(given, [*answers[:-1], answers[-1] | {"question_id": 5}])
    assert "line 12: question id 5 is not in the question file" in command.refuses(*call)


def test_pope_one_file_per_category(command: Command, labels: Path) -> None:
    given = []
    for c in CATEGORIES:
        rows = list(reversed(pope_answers(labels, c, image=lambda row: row["image"])))
        given.append(f"{c}={files.json_lines(command.folder / f'{c}.jsonl', rows)}")
    check_pope(command.scores("pope", "--labels", labels, "--answers", *given))
    assert "4 questions; without an answer: 1, 2" in command.refuses(
        "pope", "--labels", labels, "--answers", *given[:2]
    )
    message = command.refuses("pope", "--labels", labels, "--answers", given[0], given[0])
    assert "two files for random" in message
    swapped = [given[0], given[1], given[2].replace("adversarial.jsonl", "popular.jsonl")]
    assert command.scores("pope", "--labels", labels, "--answers", *swapped), (
        "nothing tells them apart"
    )


def test_pope_the_other_random_file(command: Command, labels: Path) -> None:
    """2910 or 3000: answers to the one must not be scored against the other."""
    rows = [r for c in CATEGORIES for r in pope_answers(labels, c, prompt=prompt)]
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    told = [r for c in CATEGORIES for r in pope_answers(labels, c, category=lambda _, c=c: c)]
    with_categories = files.json_lines(command.folder / "told.jsonl", told)
    longer = files.pope_labels(command.folder / "longer", {"random": 7})
    message = command.refuses("pope", "--labels", longer, "--answers", path)
    assert "12 answers for 7 random + 4 popular + 4 adversarial = 15 questions" in message
    assert "2910 questions in the version LLaVA used" in message
    message = command.refuses("pope", "--labels", longer, "--answers", with_categories)
    assert "category random: 4 answers for 7 questions; without an answer: 5, 6, 7" in message
    shorter = files.pope_labels(command.folder / "shorter", {"random": 2})
    message = command.refuses("pope", "--labels", shorter, "--answers", with_categories)
    assert "without a label: 3, 4" in message and "2910" in message


def test_pope_answers_to_other_questions(command: Command, labels: Path) -> None:
    def call(rows: list[dict]) -> str:
        path = files.json_lines(command.folder / "answers.jsonl", rows)
        return command.refuses("pope", "--labels", labels, "--answers", path)

    rows = [
        r
        for c in CATEGORIES
        for r in pope_answers(labels, c, category=lambda _, c=c: c, prompt=prompt)
    ]
    wrong = [rows[0] | {"prompt": "Is there a zebra in the image?"}, *rows[1:]]
    message = call(wrong)
    assert "category random: answers not to the questions of the label file: 1 of 4" in message
    assert "question ids 1. The first:" in message and "answers.jsonl, line 1" in message
    assert "asks about 'zebra', the label file about 'Is there a sink in the image?'" in message
    message = call([rows[0] | {"image": "COCO_val2014_000000000009.jpg"}, *rows[1:]])
    assert "is on COCO_val2014_000000000009" in message
    assert "the random answer to 1 comes twice" in call([rows[0], rows[0], *rows[2:]])
    assert "of the category pop," in call([rows[0] | {"category": "pop"}, *rows[1:]])
    bare = [{key: row[key] for key in ("question_id", "text")} for row in rows]
    assert "more than one order" in call(bare)
    assert "some answers tell their category" in call([*rows[:4], *bare[4:]])
    shifted = [row | {"question_id": row["question_id"] + 1} for row in bare]
    shifted = [s | {"category": r["category"]} for s, r in zip(shifted, rows, strict=True)]
    assert "every answer must tell its question" in call(shifted)
    unblocked = [rows[n] | {"category": None} for n in (0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11)]
    assert "in no order of the categories" in call([{**r, "category": ""} for r in unblocked])


def test_pope_the_published_typing_error(command: Command, labels: Path) -> None:
    rows = [
        r
        for c in CATEGORIES
        for r in pope_answers(
            labels, c, prompt=lambda row: "<image>\n" + prompt(row).replace("image?", "imange?")
        )
    ]
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    check_pope(command.scores("pope", "--labels", labels, "--answers", path))


def test_pope_one_category_only(command: Command, labels: Path) -> None:
    for category in ("random", "adversarial"):
        (labels / f"coco_pope_{category}.json").unlink()
    rows = pope_answers(labels, "popular")
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    scores = command.scores("pope", "--labels", labels, "--answers", path)
    assert scores["metrics"]["f1"] == scores["metrics"]["f1_popular"] == pytest.approx(4 / 5)
    assert "f1_random" not in scores["metrics"]
    assert "no label file for random, adversarial" in command.errors
