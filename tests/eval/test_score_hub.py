"""`vllm-flow score --data`: the hub's parquet files and folders of official ones, as `vllm-flow eval` reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval import files
from tests.eval.conftest import Command
from tests.eval.test_pope import hub_rows
from tests.eval.test_scienceqa import PROBLEMS
from tests.eval.test_score_command import textvqa
from tests.eval.test_textvqa import annotation
from tests.eval.test_textvqa import official as textvqa_files


def answers(command: Command, *rows: dict) -> Path:
    return files.json_lines(command.folder / "answers.jsonl", rows)


def test_the_hubs_files_of_textvqa(command: Command) -> None:
    rows = [
        annotation(n, f"i{n}", "what?") | {"image": files.hub_image((n, 0, 0))} for n in range(2)
    ]
    files.parquet(command.folder / "data/validation-00000-of-00001.parquet", rows)
    said = answers(command, *({"question_id": n, "text": rows[n]["answers"][0]} for n in range(2)))
    found = command.scores("textvqa", "--data", command.folder / "data", "--answers", said)
    assert found["metrics"]["accuracy"] == 1.0 and len(found["items"]) == 2
    official = textvqa_files(command.folder / "official")
    first = {"question_id": 34603, "text": "10"}
    by_file = command.scores(*textvqa(command, [first]))
    by_folder = command.scores("textvqa", "--data", official, "--answers", answers(command, first))
    assert by_file == by_folder


@pytest.mark.parametrize("full", [True, False])
def test_the_hubs_files_of_scienceqa(command: Command, full: bool) -> None:
    rows = [
        {key: value for key, value in problem.items() if key != "split"}
        | {"image": files.hub_image((n, 0, 0)) if problem["image"] else None}
        for n, problem in enumerate(PROBLEMS.values())
    ]
    shard = "test-00000-of-00001.parquet"
    files.parquet(command.folder / f"data/ScienceQA-IMG/{shard}", [rows[0], rows[2]])
    if full:
        files.parquet(command.folder / f"data/ScienceQA-FULL/{shard}", rows)
    said = answers(
        command, {"question_id": "row/0", "text": "A"}, {"question_id": "row/1", "text": "A"}
    )
    asked = ("scienceqa", "--data", command.folder / "data", "--answers", said)
    found = command.scores(*asked)
    assert len(found["items"]) == (4 if full else 2)
    assert found["metrics"]["accuracy"] == (0.25 if full else 0.5)
    assert ("questions without an answer: 2 of 4" in command.errors) == full
    for more in (("--problems", said), ("--splits", said)):
        assert "give --data, or both --problems and --splits" in command.refuses(*asked, *more)
    assert "give --data" in command.refuses("scienceqa", "--problems", said, "--answers", said)


def test_the_hubs_files_of_chair(command: Command, coco: Path) -> None:
    rows = [{"question_id": 7, "gt_object": ["dog"], "image": files.hub_image((1, 0, 0))}]
    files.parquet(command.folder / "data/test-00000-of-00001.parquet", rows)
    said = answers(command, {"image_id": 7, "caption": "A dog and a cat."})
    found = command.scores("chair", "--data", command.folder / "data", "--captions", said)
    assert found["metrics"]["chair_i"] == 0.5 and found["metrics"]["recall"] == 1.0
    other = answers(command, {"image_id": 8, "caption": "A dog."})
    assert "not in the annotations: 1 of 1" in command.refuses(
        "chair", "--data", command.folder / "data", "--captions", other
    )
    by_coco = command.scores("chair", "--annotations", coco, "--captions", other)
    assert command.scores("chair", "--data", coco, "--captions", other) == by_coco


def test_the_hubs_files_of_pope(command: Command, labels: Path) -> None:
    rows = hub_rows()
    files.parquet(command.folder / "data/test-00000-of-00001.parquet", rows)
    said = [
        answers(
            command,
            *(
                {"question_id": r["question_id"], "text": r["answer"]}
                for r in rows
                if r["category"] == c
            ),
        ).rename(command.folder / f"{c}.jsonl")
        for c in ("random", "popular", "adversarial")
    ]
    given = [f"{path.stem}={path}" for path in said]
    found = command.scores("pope", "--data", command.folder / "data", "--answers", *given)
    assert found["metrics"]["f1"] == 1.0 and len(found["items"]) == len(rows)
    by_labels = command.scores("pope", "--labels", labels, "--answers", *given)
    assert command.scores("pope", "--data", labels, "--answers", *given) == by_labels
