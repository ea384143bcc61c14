"""`vllm-flow score` from files to figures, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.eval import files
from tests.eval.test_scienceqa import official as scienceqa_files
from tests.eval.test_textvqa import official as textvqa_files
from vllm_flow.cli import main

CATEGORIES = ("random", "popular", "adversarial")


class Command:
    """Runs `vllm-flow score` and keeps what it said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def scores(self, *arguments: object) -> dict[str, Any]:
        out = self.folder / "out/scores.json"
        status = main(["score", *map(str, arguments), "--json", str(out)])
        self.output, self.errors = self.capsys.readouterr()
        assert status == 0, self.errors
        return json.loads(out.read_text())

    def refuses(self, *arguments: object) -> str:
        assert main(["score", *map(str, arguments)]) == 2
        self.output, self.errors = self.capsys.readouterr()
        assert self.output == ""
        assert self.errors.count("\n") == 1 and "Traceback" not in self.errors
        return self.errors


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


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


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return files.pope_labels(tmp_path / "labels")


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
    assert "category random: 1 of 4 answers are not to the questions" in message
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


# ScienceQA: the split is 11 (no image), 4 and 5; the answers are B, A, C.
def scienceqa(command: Command, rows: list[dict], *more: str) -> tuple[object, ...]:
    folder = scienceqa_files(command.folder)
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    return (
        "scienceqa", "--problems", folder / "problems.json", "--splits", folder / "pid_splits.json",
        "--answers", path, *more,
    )  # fmt: skip


def test_scienceqa(command: Command) -> None:
    rows = [
        {"question_id": "4", "prompt": "<image>\nQ", "text": "A. one"},
        {"question_id": "5", "prompt": "<image>\nQ", "text": "D"},
        {"question_id": 11, "prompt": "Q", "text": "The answer is B."},
    ]
    scores = command.scores(*scienceqa(command, rows))
    assert scores["task"] == "scienceqa"
    assert scores["metrics"] == {
        "accuracy": pytest.approx(2 / 3), "img_accuracy": 0.5,
    }  # fmt: skip
    assert scores["items"] == [
        {"id": "11", "parsed": "B", "score": 1.0},
        {"id": "4", "parsed": "A", "score": 1.0},
        {"id": "5", "parsed": "D", "score": 0.0},
    ]
    assert command.errors == ""
    assert "accuracy with image" in command.output and "50.00 %" in command.output


def test_scienceqa_a_missing_answer(command: Command) -> None:
    rows = [{"question_id": "4", "prompt": "<image>\nQ", "text": "A"}]
    scores = command.scores(*scienceqa(command, rows, "--split", "test"))
    assert scores["metrics"] == {"accuracy": pytest.approx(1 / 3), "img_accuracy": 1.0}
    assert "2 of 3 questions have no answer and count as wrong" in command.errors


def test_scienceqa_the_prompt_says_what_was_seen(command: Command) -> None:
    rows = [{"question_id": "4", "prompt": "Q", "text": "A"}, {"question_id": "5", "text": "A"}]
    scores = command.scores(*scienceqa(command, rows))
    assert scores["metrics"]["img_accuracy"] == 0.0, "problem 4 was asked without its image"


def test_scienceqa_refusals(command: Command) -> None:
    row = {"question_id": "4", "prompt": "Q", "text": "A"}
    assert "problem ids that are not in this split: 6, 77" in command.refuses(
        *scienceqa(command, [row, row | {"question_id": "6"}, row | {"question_id": 77}])
    )
    assert "line 2: the answer to 4 comes twice" in command.refuses(*scienceqa(command, [row, row]))
    assert "no split 'tset'" in command.refuses(*scienceqa(command, [row], "--split", "tset"))
    assert "line 1: no 'text'" in command.refuses(*scienceqa(command, [{"question_id": "4"}]))
    assert "no answers in it" in command.refuses(*scienceqa(command, []))


# TextVQA
OCR_PROMPTS = [
    "What is the brand?\nReference OCR token: NOKIA, x\nAnswer the question using a single word or phrase.",
    "Reference OCR token: NOKIA\nWHAT IS THE BRAND?\nAnswer the question using a single word or phrase.",
    "What is the brand?\nAnswer the question using a single word or phrase.",
    "OCR tokens: NOKIA\nx. Question: what is the brand? Short answer:",
    "<image>\nWhat is the brand?\nAnswer the question using a single word or phrase.",
    "what is the brand?",
]


def textvqa(command: Command, rows: list[dict]) -> tuple[object, ...]:
    folder = textvqa_files(command.folder)
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    return ("textvqa", "--annotations", folder / "TextVQA_0.5.1_val.json", "--answers", path)


@pytest.mark.parametrize("asked", OCR_PROMPTS)
def test_textvqa(command: Command, asked: str) -> None:
    rows = [
        {"question_id": "003a8ae2ef43b901", "prompt": "What time?\nAnswer", "text": "Nine"},
        {"question_id": "003a8ae2ef43b901", "prompt": asked, "text": "The Nokia."},
        {"question_id": "ff", "prompt": "What is it?\nAnswer", "text": "x"},
    ]
    scores = command.scores(*textvqa(command, rows))
    assert scores["metrics"] == {"accuracy": pytest.approx(1 / 3)}
    assert scores["items"][1] == {"id": "34602", "parsed": "nokia", "score": 1.0}
    assert command.errors == ""
    assert "33.33 %" in command.output


def test_textvqa_by_question_id_and_in_part(command: Command) -> None:
    scores = command.scores(*textvqa(command, [{"question_id": 34603, "text": "10"}]))
    assert scores["metrics"] == {"accuracy": 1.0}
    assert "2 of 3 questions have no answer" in command.errors


def test_textvqa_refusals(command: Command) -> None:
    row = {"question_id": "ff", "prompt": "What is it?\nAnswer", "text": "x"}
    assert "line 2: a second answer to 'what is it?' on image ff" in command.refuses(
        *textvqa(command, [row, row])
    )
    message = command.refuses(*textvqa(command, [row, row | {"prompt": "What time?\nAnswer"}]))
    assert "1 of 2 answers are to no question of the annotations" in message
    assert "line 2 (ff)" in message
    assert "no 'prompt', and ff is none of" in command.refuses(
        *textvqa(command, [{"question_id": "ff", "text": "x"}])
    )


# CHAIR
@pytest.fixture
def coco(tmp_path: Path) -> Path:
    splits = {"val": {7: (["dog"], ["A man and a dog."]), 8: (["cat"], [])}}
    return files.coco(tmp_path / "annotations", splits)


CAPTIONS = [
    {"image_id": 7, "caption": "A dog, a dog and a car."},
    {"image_id": 8, "caption": "A cat."},
]


def check_chair(scores: dict) -> None:
    assert scores["task"] == "chair"
    assert scores["metrics"] == {
        "chair_s": 0.5, "chair_i": 0.25, "recall": pytest.approx(2 / 3), "len": 6.0,
    }  # fmt: skip
    assert scores["items"][0] == {
        "id": "7",
        "parsed": {"mentioned": ["dog", "dog", "car"], "hallucinated": ["car"]},
        "score": pytest.approx(2 / 3),
    }


def test_chair(command: Command, coco: Path) -> None:
    lines = files.json_lines(command.folder / "captions.jsonl", CAPTIONS)
    check_chair(command.scores("chair", "--annotations", coco, "--captions", lines))
    assert "CHAIR_i" in command.output and "25.00 %" in command.output
    as_list = files.json_file(command.folder / "captions.json", CAPTIONS)
    call = ("chair", "--annotations", coco.parent, "--captions", as_list, "--rule", "official")
    check_chair(command.scores(*call))


def test_chair_refusals(command: Command, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(captions: list[dict], *more: str) -> str:
        path = files.json_lines(command.folder / "captions.jsonl", captions)
        return command.refuses("chair", "--annotations", coco, "--captions", path, *more)

    assert "line 3: the caption of image 7 comes twice" in call([*CAPTIONS, CAPTIONS[0]])
    message = call([*CAPTIONS, {"image_id": 99, "caption": "x"}])
    assert "1 of 3 images are not in the annotations" in message and ": 99" in message
    assert "'image_id' is 'x', not a COCO" in call([{"image_id": "x", "caption": "x"}])
    assert "no 'caption'" in call([{"image_id": 7, "text": "x"}])
    import nltk

    def no_tagger(tokens: list[str]) -> None:
        raise LookupError

    monkeypatch.setattr(nltk, "pos_tag", no_tagger)
    assert "nltk.downloader averaged_perceptron_tagger_eng" in call(CAPTIONS, "--rule", "opera")


# Everything
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "answers.jsonl: no such file"),
        ('{"question_id": "4", "text": "A"}\nnonsense\n', "answers.jsonl, line 2: not JSON"),
        ('{"question_id": "4", "text": "A"', "answers.jsonl, line 1: not JSON"),
        ('"text"\n', "line 1: expected an object"),
        ('{"text": "A"}\n', "line 1: no 'question_id' (the record has text)"),
        ('{"question_id": "4", "text": null}\n', "line 1: 'text' is None, not text"),
        ('{"question_id": 4.5, "text": "A"}\n', "line 1: 'question_id' is 4.5, not"),
        ("\n\n", "no answers in it"),
        ("[1]", "record 0: expected an object"),
    ],
)
@pytest.mark.parametrize("task", ["pope", "scienceqa"])
def test_bad_answer_files(
    command: Command, labels: Path, task: str, content: str | None, message: str
) -> None:
    call = (
        ("pope", "--labels", labels, "--answers", command.folder / "answers.jsonl")
        if task == "pope"
        else scienceqa(command, [])
    )
    path = command.folder / "answers.jsonl"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    assert message in command.refuses(*call)


def test_output_that_cannot_be_written(command: Command) -> None:
    (command.folder / "file").write_text("")
    rows = [{"question_id": "4", "text": "A"}]
    out = str(command.folder / "file/scores.json")
    assert "cannot be written" in command.refuses(*scienceqa(command, rows, "--json", out))


KEYS = st.sampled_from(
    ["question_id", "text", "prompt", "category", "image", "label", "choices", "answer", "hint", "test",
     "question", "image_id", "answers", "caption", "annotations", "images", "categories", "id", "name",
     "category_id", "data", "4"]
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 9)
    | st.floats()
    | st.sampled_from(["", "7", "no", "A"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


def damaged(value: Any, key: str, new: Any, nth: list[int]) -> Any:
    """`value` with the nth occurrence of `key` set to `new`, or taken away where that is None."""
    if isinstance(value, list):
        return [damaged(one, key, new, nth) for one in value]
    if not isinstance(value, dict):
        return value
    changed = {}
    for name, one in value.items():
        if name == key:
            nth[0] -= 1
            if nth[0] == -1:
                if new is not None:
                    changed[name] = new
                continue
        changed[name] = damaged(one, key, new, nth)
    return changed


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
@given(st.sampled_from(["pope", "scienceqa", "textvqa", "chair"]), st.integers(0, 20), KEYS, VALUES,
       st.integers(0, 2))  # fmt: skip
def test_damaged_files_never_give_a_traceback(
    command: Command, task: str, which: int, key: str, new: Any, nth: int
) -> None:
    """Any value of any file replaced by another, or missing: figures, or one sentence and status 2."""
    folder = command.folder / task
    answers = folder / "answers.jsonl"
    files.pope_labels(folder)
    scienceqa_files(folder)
    textvqa_files(folder)
    files.coco(folder, {"val": {7: (["dog"], ["A man."]), 8: (["cat"], [])}})
    calls: dict[str, tuple[list[dict], list[object], list[str]]] = {
        "pope": (
            [r | {"category": c, "prompt": "", "image": None} for c in CATEGORIES for r in pope_answers(folder, c)],
            ["--labels", folder, "--answers", answers],
            ["coco_pope_random.json"],
        ),
        "scienceqa": (
            [{"question_id": "4", "prompt": "<image>", "text": "A"}],
            ["--problems", folder / "problems.json", "--splits", folder / "pid_splits.json",
             "--answers", answers],
            ["problems.json", "pid_splits.json"],
        ),
        "textvqa": (
            [{"question_id": "ff", "prompt": "what is it?", "text": "A"}],
            ["--annotations", folder / "TextVQA_0.5.1_val.json", "--answers", answers],
            ["TextVQA_0.5.1_val.json"],
        ),
        "chair": (
            [{"image_id": 7, "caption": "A dog."}],
            ["--annotations", folder, "--captions", answers],
            ["instances_val2014.json", "captions_val2014.json"],
        ),
    }  # fmt: skip
    rows, arguments, inputs = calls[task]
    files.json_lines(answers, rows)
    names = ["answers.jsonl", *inputs]
    path = folder / names[which % len(names)]
    text = path.read_text()
    lines = [json.loads(text)] if path.suffix == ".json" and "pope" not in path.name else [
        json.loads(line) for line in text.splitlines()
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(one) for one in damaged(lines, key, new, [nth])))
    command.capsys.readouterr()
    status = main(["score", task, *map(str, arguments)])
    output, errors = command.capsys.readouterr()
    assert (status == 0 and output) or (status == 2 and not output and errors.count("\n") == 1)


def test_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["score", "vqa"])
    assert "invalid choice: 'vqa'" in capsys.readouterr().err
