"""`vllm-flow score` from files to figures, and what it refuses; POPE's joins are in test_score_pope.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval import files
from tests.eval.conftest import Command
from tests.eval.test_scienceqa import official as scienceqa_files
from tests.eval.test_textvqa import official as textvqa_files
from vllm_flow.cli import main
from vllm_flow.eval.tasks import task_names
from vllm_flow.eval.tasks.reading import few


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
    assert "questions without an answer: 2 of 3, which count as wrong" in command.errors


def test_scienceqa_the_prompt_says_what_was_seen(command: Command) -> None:
    rows = [{"question_id": "4", "prompt": "Q", "text": "A"}, {"question_id": "5", "text": "A"}]
    scores = command.scores(*scienceqa(command, rows))
    assert scores["metrics"]["img_accuracy"] == 0.0, "problem 4 was asked without its image"


def test_scienceqa_refusals(command: Command) -> None:
    row = {"question_id": "4", "prompt": "Q", "text": "A"}
    assert "problem ids that are not in this split, 2 of 3: 6, 77" in command.refuses(
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
    assert "questions without an answer: 2 of 3" in command.errors


def test_textvqa_refusals(command: Command) -> None:
    row = {"question_id": "ff", "prompt": "What is it?\nAnswer", "text": "x"}
    assert "line 2: a second answer to 'what is it?' on image ff" in command.refuses(
        *textvqa(command, [row, row])
    )
    message = command.refuses(*textvqa(command, [row, row | {"prompt": "What time?\nAnswer"}]))
    assert "answers to no question of the annotations: 1 of 2" in message
    assert "line 2 (ff)" in message
    assert "no 'prompt', and ff is none of" in command.refuses(
        *textvqa(command, [{"question_id": "ff", "text": "x"}])
    )


def test_a_long_path_does_not_hide_the_line() -> None:
    told = few([f"/{'folder/' * 20}answers.jsonl: line 2 (ff)", "short"])
    assert told.startswith("/folder/") and "answers.jsonl: line 2 (ff), short" in told
    assert len(told) < 100


# CHAIR
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
    call = ("chair", "--annotations", coco.parent, "--captions", as_list)
    check_chair(command.scores(*call))


def test_chair_refusals(command: Command, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(captions: list[dict], task: str = "chair") -> str:
        path = files.json_lines(command.folder / "captions.jsonl", captions)
        return command.refuses(task, "--annotations", coco, "--captions", path)

    assert "line 3: the caption of image 7 comes twice" in call([*CAPTIONS, CAPTIONS[0]])
    message = call([*CAPTIONS, {"image_id": 99, "caption": "x"}])
    assert "images that are not in the annotations: 1 of 3" in message and ": 99" in message
    assert "'image_id' is 'x', not a COCO" in call([{"image_id": "x", "caption": "x"}])
    assert "no 'caption'" in call([{"image_id": 7, "text": "x"}])
    import nltk

    def no_tagger(tokens: list[str]) -> None:
        raise LookupError

    monkeypatch.setattr(nltk, "pos_tag", no_tagger)
    assert "nltk.downloader averaged_perceptron_tagger_eng" in call(CAPTIONS, "chair-opera")


# Everything
@pytest.mark.parametrize("name", task_names())
def test_every_task_that_can_be_asked_can_be_scored(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["score", name, "--help"])
    assert ended.value.code == 0 and "--json OUT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "answers.jsonl: no such file"),
        ('{"question_id": "4", "text": "A"}\nnonsense\n', "answers.jsonl, line 2: not JSON"),
        ('{"question_id": "4", "text": "A"', "answers.jsonl, line 1: not JSON"),
        ('"text"\n', "line 1: expected an object"),
        ('{"text": "A"}\n', "line 1: no 'question_id' (the record has text)"),
        ('{"question_id": "4", "text": null}\n', "line 1: 'text' is null, not text"),
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
    assert "cannot be written" in command.refuses(
        *scienceqa(command, rows, "--json", out), status=1
    )


def test_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["score", "vqa"])
    assert "invalid choice: 'vqa'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call", [("pope", "--answers", "a"), ("chair", "--captions", "a"), ("textvqa", "--answers", "a"),
             ("pope", "--labels", "a", "--data", "a", "--answers", "a")],
)  # fmt: skip
def test_where_the_questions_are_is_said_once(command: Command, call: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        command.refuses(*call)
