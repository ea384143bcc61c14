"""POPE on its three sources: label files of COCO, A-OKVQA and GQA, the published ones where they are at hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.eval import files
from tests.eval.conftest import Command
from tests.eval.files import arguments
from tests.eval.test_score_pope import CATEGORIES, prompt
from vllm_flow.eval.sweep.run import read_task
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.pope import SOURCES, Pope
from vllm_flow.eval.tasks.reading import DataError

PUBLISHED = next(
    (p / "shared/data/pope" for p in Path(__file__).parents if (p / "shared/data/pope").is_dir()),
    None,
)
"""The published label files, beside the checkout where there are any."""


def label_name(source: str, category: str) -> str:
    return f"{source}_pope_{'' if source == 'coco' else 'seem_'}{category}.json"


def rows_of(labels: Path, source: str, category: str) -> list[dict[str, Any]]:
    text = (labels / label_name(source, category)).read_text()
    return json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))


def label_files(folder: Path, source: str, spare: str = "sink") -> Path:
    """A source's three files: two pictures, and one question that is asked twice with both answers."""
    for category, objects in files.POPE_OBJECTS.items():
        names = [*objects, spare, *objects[2:]]
        rows = [
            {
                "question_id": n + 1,
                "image": f"{source}{0 if n < 5 else 1}.jpg",
                "text": f"Is there a {name} in the image?",
                "label": "yes" if n < 2 else "no",
            }
            for n, name in enumerate(names)
        ]
        files.json_file(folder / label_name(source, category), rows)
    return folder


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("folder", [".", "{}", "output/{}", "output/seem/{}"])
def test_the_files_that_are_there_decide(tmp_path: Path, source: str, folder: str) -> None:
    label_files(tmp_path / folder.format(source), source)
    files.image_file(tmp_path / "images" / f"{source}0.jpg")
    items = get_task("pope").read(tmp_path)
    assert len(items) == len({item.id for item in items}) == 21
    assert items == get_task(f"pope-{source}").read(tmp_path)
    assert items[0].image == str(tmp_path / "images" / f"{source}0.jpg")
    other = next(name for name in SOURCES if name != source)
    with pytest.raises(DataError, match=f"no label files {other}_pope_"):
        get_task(f"pope-{other}").read(tmp_path)


def test_several_sources_need_a_name(tmp_path: Path, command: Command) -> None:
    for source in SOURCES:
        label_files(tmp_path / "data/pope", source)
    with pytest.raises(DataError, match="COCO and A-OKVQA and GQA.*pope-coco or pope-aokvqa or"):
        get_task("pope").read(tmp_path / "data/pope")
    for source in SOURCES:
        work = read_task(f"pope-{source}", arguments(tmp_path / "data"), "llava-1.5", None)
        assert {item.truth["image"] for item in work.items} == {f"{source}0.jpg", f"{source}1.jpg"}
    answers = files.json_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "No"}])
    call = ("--labels", tmp_path / "data/pope", "--answers", answers)
    assert "take pope-coco or" in command.refuses("pope", *call)
    assert "1 answer for 7 random" in command.refuses("pope-gqa", *call)


def test_two_files_for_one_category(tmp_path: Path) -> None:
    label_files(tmp_path, "gqa")
    files.json_file(tmp_path / "gqa_pope_popular.json", [])
    with pytest.raises(
        DataError, match="both gqa_pope_popular.json and gqa_pope_seem_popular.json"
    ):
        get_task("pope").read(tmp_path)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("by_file", [False, True])
def test_the_kth_answer_is_to_the_kth_question(
    command: Command, tmp_path: Path, shuffled: bool, by_file: bool
) -> None:
    """One picture is asked about a sink twice, labelled yes and no; answers with ids of their own."""
    labels = label_files(tmp_path / "labels", "aokvqa")
    questions = [
        {"question_id": 1000 * n + row["question_id"], "image": row["image"], "text": prompt(row),
         "category": category, "label": row["label"]}
        for n, category in enumerate(CATEGORIES, 1)
        for row in rows_of(labels, "aokvqa", category)
    ]  # fmt: skip
    answers = [
        {"question_id": q["question_id"], "text": q["label"].capitalize()}
        | ({} if by_file else {"image": q["image"], "prompt": q["text"], "category": q["category"]})
        for q in questions
    ]
    if shuffled:
        # By a question file, the ids say which comes first; without one, the answers' order does.
        random.Random(3).shuffle(answers)
        if not by_file:
            answers.sort(key=lambda row: row["question_id"])
    path = files.json_lines(tmp_path / "answers.jsonl", answers)
    asked = files.json_lines(tmp_path / "asked.jsonl", questions)
    call = ["pope", "--labels", labels, "--answers", path]
    scores = command.scores(*call, *(["--questions", asked] if by_file else []))
    assert scores["metrics"]["f1"] == scores["metrics"]["accuracy"] == 1.0
    assert len(scores["items"]) == 21
    if not by_file:
        twice = [*answers[:6], answers[0] | {"question_id": 7}, *answers[7:]]
        files.json_lines(path, twice)
        assert "question ids 7" in command.refuses(*call) or "too often" in command.errors


published = pytest.mark.skipif(PUBLISHED is None, reason="POPE's label files are not at hand")


@published
@pytest.mark.parametrize("source", SOURCES)
def test_published_label_files(source: str) -> None:
    assert PUBLISHED is not None
    task = Pope(source=source)
    items = task.read(PUBLISHED)
    assert len(items) == len({item.id for item in items}) == 9000
    by_category = {c: [i for i in items if i.group == c] for c in CATEGORIES}
    for category, own in by_category.items():
        assert len(own) == 3000
        assert sum(i.truth["label"] == "yes" for i in own) == 1500
        raw = rows_of(PUBLISHED, source, category)
        assert [i.truth["question"] for i in own] == [row["text"] for row in raw]
    with pytest.raises(DataError, match="COCO and A-OKVQA and GQA"):
        get_task("pope").read(PUBLISHED)


@published
@pytest.mark.parametrize("source", ["aokvqa", "gqa"])
def test_published_files_joined_by_picture_and_question(command: Command, source: str) -> None:
    """Their adversarial files ask one picture the same question twice; the answers' ids are not the files'."""
    assert PUBLISHED is not None
    questions, answers = [], []
    for category in CATEGORIES:
        for row in rows_of(PUBLISHED, source, category):
            number = len(questions) + 50_000
            questions.append({"question_id": number, "image": row["image"], "text": prompt(row),
                              "category": category})  # fmt: skip
            answers.append({"question_id": number, "text": row["label"].capitalize()})
    random.Random(0).shuffle(answers)
    asked = files.json_lines(command.folder / "asked.jsonl", questions)
    given = files.json_lines(command.folder / "answers.jsonl", answers)
    scores = command.scores(
        f"pope-{source}", "--labels", PUBLISHED, "--answers", given, "--questions", asked
    )
    assert scores["metrics"]["f1"] == 1.0 and len(scores["items"]) == 9000
