"""`vllm-flow score` for the tasks whose items have ids of their own: joins, notes, points, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.eval import files
from tests.eval.conftest import Command
from tests.eval.test_choices import ROWS, mme_folders, tsv
from vllm_flow.eval.scoring.plain_answers import HELP
from vllm_flow.eval.tasks import task_names


def test_every_task_can_be_scored() -> None:
    own = {"pope", "scienceqa", "textvqa", "chair"}
    stems = {name for name in task_names() if name.partition("-")[0] not in own}
    assert stems == set(HELP)


def documents(folder: Path) -> Path:
    rows = [
        {"questionId": n, "question": "Q?", "answers": ["abcd"], "image": "p.png"} for n in (1, 2)
    ]
    files.json_file(folder / "val_v1.0.json", {"data": rows})
    return folder


def test_a_benchmarks_own_result_file(command: Command, tmp_path: Path) -> None:
    answers = [{"questionId": 1, "answer": "abcd"}, {"questionId": 2, "answer": "abxx"}]
    path = files.json_file(tmp_path / "result.json", answers)
    data = documents(tmp_path / "docvqa")
    scores = command.scores("docvqa", "--data", data, "--answers", path)
    assert scores["metrics"] == {"anls": 0.75}
    assert scores["items"][1] == {"id": "2", "parsed": "abxx", "score": 0.5}
    assert "ANLS" in command.output and "75.00 %" in command.output and command.errors == ""


def test_missing_unknown_and_double_answers(command: Command, tmp_path: Path) -> None:
    data = documents(tmp_path / "docvqa")

    def call(rows: list[dict]) -> tuple[object, ...]:
        path = files.json_lines(tmp_path / "answers.jsonl", rows)
        return ("docvqa", "--data", data, "--answers", path)

    one = {"question_id": 1, "text": "abcd"}
    assert command.scores(*call([one]))["metrics"] == {"anls": 1.0}
    assert "questions without an answer: 1 of 2, left out" in command.errors
    assert "line 2: the answer to 1 comes twice" in command.refuses(*call([one, one]))
    assert "1 answer is to no question" in command.refuses(*call([{"question_id": 3, "text": "x"}]))
    assert "no 'text'" in command.refuses(*call([{"question_id": 1}]))
    assert "no 'question_id'" in command.refuses(*call([{"text": "x"}]))
    assert "neither val_v1.0" in command.refuses(
        "docvqa", "--data", tmp_path / "docvqa/..", "--answers", call([one])[-1]
    )


def test_mme_in_llavas_format_and_in_points(command: Command, tmp_path: Path) -> None:
    data = mme_folders(tmp_path / "mme")
    request = "\nAnswer the question using a single word or phrase."
    rows = [
        {"question_id": f"{task}/{picture}", "prompt": f"{question}{request}", "text": text}
        for task in ("count", "posters")
        for picture in ("1.png", "2.jpg")
        for question, text in (("Is it not?", "No"), (f"Is it {task}?", "Yes"))
    ]
    path = files.json_lines(tmp_path / "answers.jsonl", rows)
    scores = command.scores("mme", "--data", data, "--answers", path)
    assert scores["metrics"]["perception"] == 1.0
    assert "2000.00 of 2000 points" in command.output
    assert (
        "note: perception is over 2 of its 10 parts (count, posters); nothing was answered of the others"
        in command.errors
    )
    assert "cognition is" not in command.errors
    files.json_lines(path, rows[:1])
    assert command.scores("mme", "--data", data, "--answers", path)["metrics"]["count"] == 0.5
    assert (
        "1 question lacks an answer to one of the parts that are scored together" in command.errors
    )
    files.json_lines(path, [{"question_id": "count/1.png", "text": "Yes"}])
    assert "2 questions have this id (count/1.png#1, count/1.png#2)" in command.refuses(
        "mme", "--data", data, "--answers", path
    )
    files.json_lines(path, [rows[0] | {"prompt": "Is it blue?"}])
    assert "is the question of 0 items" in command.refuses("mme", "--data", data, "--answers", path)


def test_mmbench_by_index(command: Command, tmp_path: Path) -> None:
    tsv(tmp_path / "data/mmbench.tsv", ROWS)
    rows = [
        {"index": index, "prediction": said, "A": "red", "answer": "X"}
        for index, said in ((7, "B"), (1_000_007, "A"), (2_000_007, "C"), (8, "what?"))
    ]
    path = files.json_lines(tmp_path / "answers.jsonl", rows)
    scores = command.scores("mmbench", "--data", tmp_path / "data", "--answers", path)
    assert scores["metrics"]["accuracy"] == 0.5
    assert re.search("answers that name no option .*: 1 of 4", command.errors)


@pytest.mark.parametrize("name", sorted(HELP))
def test_data_that_is_not_there(command: Command, tmp_path: Path, name: str) -> None:
    path = files.json_lines(tmp_path / "answers.jsonl", [{"question_id": 1, "text": "x"}])
    (tmp_path / "empty").mkdir()
    message = command.refuses(name, "--data", tmp_path / "empty", "--answers", path)
    assert str(tmp_path / "empty") in message
    assert "no such directory" in command.refuses(
        name, "--data", tmp_path / "no", "--answers", path
    )


def test_a_part_that_nothing_was_asked_of_has_no_figure(command: Command, tmp_path: Path) -> None:
    """Its 0/0 would read as if every answer of the part were wrong."""
    data = tmp_path / "chartqa"
    files.json_file(data / "test_human.json", [{"imgname": "1.png", "query": "Q?", "label": "1"}])
    answers = files.json_lines(
        tmp_path / "answers.jsonl", [{"question_id": "human/0", "text": "2"}]
    )
    scores = command.scores("chartqa", "--data", data, "--answers", answers)
    assert scores["metrics"] == {"accuracy": 0.0, "accuracy_human": 0.0}
    assert "accuracy human" in command.output and "augmented" not in command.output
