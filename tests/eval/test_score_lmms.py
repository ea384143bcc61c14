"""What lmms-eval recorded, scored by our rules: joins by row, and where the two scorers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.eval import files
from tests.eval.conftest import Command

QUESTIONS = [("sink", "yes", "random"), ("dog", "no", "popular"), ("cat", "yes", "adversarial"),
             ("fork", "no", "random")]  # fmt: skip


def hub(folder: Path, name: str, rows: Sequence[tuple[str, str, str]]) -> Path:
    """POPE's parquet, whose rows are not in the order in which our task has its items."""
    records = [
        {"question_id": str(n), "question": f"Is there a {thing} in the image?", "answer": answer,
         "category": category, "image_source": f"p{n}", "image": files.hub_image((n, 2, 3))}
        for n, (thing, answer, category) in enumerate(rows)
    ]  # fmt: skip
    files.parquet(folder / name, records)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two shards."""
    folder = tmp_path / "POPE"
    hub(folder, "data/test-00000-of-00002.parquet", QUESTIONS[:3])
    return hub(folder, "data/test-00001-of-00002.parquet", [("knife", "yes", "popular")])


def sample(row: int, thing: str, said: Any, score: float) -> dict[str, Any]:
    """A line of lmms-eval 0.7.3."""
    own = {"question_id": str(row), "score": score, "prediction": said, "ground_truth": "yes"}
    return {
        "doc_id": row, "target": "yes", "filtered_resps": said, "token_counts": [None], "doc_hash": "0",
        "pope_accuracy": own, "pope_precision": own,
        "input": f"Is there a {thing} in the image?\nAnswer the question using a single word or phrase.",
    }  # fmt: skip


SAMPLES = [
    sample(0, "sink", "Yes", 1.0),
    sample(1, "dog", "no", 1.0),
    sample(2, "cat", "yes, there is", 0.0),
    sample(3, "knife", ["yes"], 1.0),
]


def call(folder: Path, data: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[object, ...]:
    path = files.json_lines(folder / "samples_pope.jsonl", rows)
    return ("lmms-eval", "--as", "pope", "--data", data, "--answers", path)


def test_answers_are_joined_by_row_and_scored_by_our_rule(command: Command, data: Path) -> None:
    scores = command.scores(*call(command.folder, data, SAMPLES[::-1]))
    assert scores["task"] == "pope" and scores["metrics"]["accuracy"] == 1.0
    assert {item["id"]: item["parsed"] for item in scores["items"]} == {
        "random/0": "yes", "popular/1": "no", "popular/0": "yes", "adversarial/2": "yes",
    }  # fmt: skip
    assert "75.00 % by lmms-eval, 100.00 % by our rule" in command.errors
    assert "answers scored differently: 1 of 4, adversarial/2" in command.errors


def test_a_part_of_the_questions(command: Command, data: Path) -> None:
    assert len(command.scores(*call(command.folder, data, SAMPLES[:2]))["items"]) == 2
    assert "questions without an answer, left out: 2 of 4" in command.errors
    assert "answers scored alike: all 2" in command.errors


def test_a_score_that_is_a_number(command: Command, data: Path) -> None:
    rows = [
        {key: value for key, value in one.items() if not key.startswith("pope")}
        | {"target": 7, "exact_match": score}
        for one, score in zip(SAMPLES, (1, 1, 0.4, True), strict=True)
    ]
    command.scores(*call(command.folder, data, rows))
    assert (
        "85.00 % by lmms-eval, 100.00 % by our rule; answers scored differently: 1 of 4"
        in command.errors
    )
    bare = [{key: value for key, value in one.items() if key != "exact_match"} for one in rows]
    command.scores(*call(command.folder, data, bare))
    assert "by lmms-eval" not in command.errors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"doc_id": 9}, "answers to rows that have no question with a picture in the data: 1 of 4"),
        ({"doc_id": 1}, "the answer to row 1 comes twice"),
        ({"input": "Is there a cow in the image?"}, "row 0 of the data is"),
        ({"filtered_resps": ["a", "b"]}, "not one text"),
        ({"filtered_resps": "[LMMS_EVAL_REQUEST_FAILED after 5 retries] no"}, "no answer to 1 of 4"),
        ({"filtered_resps": None}, "filtered_resps"),
    ],
)  # fmt: skip
def test_refusals(command: Command, data: Path, change: dict[str, Any], says: str) -> None:
    rows = [SAMPLES[0] | change, *SAMPLES[1:]]
    assert says in command.refuses(*call(command.folder, data, rows))


def test_refused_data(command: Command, data: Path, tmp_path: Path) -> None:
    *rest, answers = call(command.folder, data, SAMPLES)
    assert "no task 'poppy'" in command.refuses(
        "lmms-eval", "--as", "poppy", "--data", data, "--answers", answers
    )
    official = files.pope_labels(tmp_path / "official")
    assert "must be a folder of these" in command.refuses(
        "lmms-eval", "--as", "pope", "--data", official, "--answers", answers
    )
    splits = tmp_path / "splits"
    hub(splits, "Full/random-00000-of-00001.parquet", [QUESTIONS[0]])
    hub(splits, "Full/popular-00000-of-00001.parquet", [QUESTIONS[1]])
    assert "files of several splits" in command.refuses(
        "lmms-eval", "--as", "pope", "--data", splits, "--answers", answers
    )
