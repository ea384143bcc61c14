"""Damaged benchmark files, as `vllm-flow eval` reads them: items that can be kept, or one DataError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.eval import files
from tests.eval.test_amber import benchmark as amber_files
from tests.eval.test_choices import ROWS, mme_folders, tsv
from tests.eval.test_pope_sources import label_files
from tests.eval.test_refcoco import official as refcoco_files
from tests.eval.test_scienceqa import official as scienceqa_files
from tests.eval.test_score_input import damaged
from tests.eval.test_short_answers import gqa_question
from tests.eval.test_textvqa import official as textvqa_files
from vllm_flow.eval.sweep.schema import items_table
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.reading import DataError


def textvqa(folder: Path) -> None:
    textvqa_files(folder)
    files.json_file(
        folder / "TextVQA_Rosetta_OCR_v0.2_val.json",
        {"data": [{"image_id": "ff", "ocr_tokens": ["a", "b"]}]},
    )


def chair(folder: Path) -> None:
    files.coco(folder, {"val": {7: (["dog"], ["A man."]), 8: (["cat"], [])}})
    (folder / "chair_images.txt").write_text("7\n8\n")


def gqa(folder: Path) -> None:
    question = gqa_question("n1", "Is it red?", "yes", "verify")
    files.json_file(folder / "testdev_balanced_questions.json", {"01": question})


def documents(folder: Path, name: str, picture: str) -> None:
    rows = [{"questionId": n, "question": "Q?", "answers": ["x"], picture: "p.png"} for n in (1, 2)]
    files.json_file(folder / name, {"data": rows})


def ocrbench(folder: Path) -> None:
    row = {
        "dataset_name": "svt", "id": 7, "image_path": "0.png", "question": "Q", "answers": ["x", "y"],
        "type": "Doc-oriented VQA",
    }  # fmt: skip
    files.json_file(folder / "OCRBench.json", [row, row | {"answers": "x"}])


def ai2d(folder: Path) -> None:
    question = {
        "questionId": "0.png-0",
        "answerTexts": ["x", "y"],
        "correctAnswer": 1,
        "abcLabel": False,
    }
    content = {"imageName": "0.png", "questions": {"P?": question}}
    files.json_file(folder / "questions/0.png.json", content)
    (folder / "ai2d_test_ids.csv").write_text("0\n")


def vizwiz(folder: Path) -> None:
    answers = [{"answer": "grey", "answer_confidence": "yes"}] * 10
    row = {"image": "1.jpg", "question": "?", "answers": answers, "answer_type": "other"}
    files.json_file(folder / "val.json", [row])


def refcoco(folder: Path) -> None:
    line = {"image": "x/1.jpg", "sent": "dog", "bbox": [0, 0, 2, 2], "width": 4, "height": 2}
    files.json_lines(folder / "refcoco_val.jsonl", [line])


OFFICIAL: dict[str, Callable[[Path], Any]] = {
    "pope": files.pope_labels,
    "pope-gqa": lambda folder: label_files(folder, "gqa"),
    "scienceqa": scienceqa_files,
    "textvqa": textvqa,
    "chair": chair,
    "gqa": gqa,
    "mme": mme_folders,
    "chartqa": lambda folder: files.json_file(
        folder / "test_human.json", [{"imgname": "1.png", "query": "Q?", "label": "1"}]
    ),
    "docvqa": lambda folder: documents(folder, "val_v1.0.json", "image"),
    "infovqa": lambda folder: documents(
        folder, "infographicsVQA_val_v1.0.json", "image_local_name"
    ),
    "ocrbench": ocrbench,
    "mmbench": lambda folder: tsv(folder / "mmbench.tsv", ROWS),
    "ai2d": ai2d,
    "realworldqa": lambda folder: files.json_lines(
        folder / "annotations.jsonl", [{"image": "1.webp", "question": "Q", "answer": "A"}]
    ),
    "vizwiz": vizwiz,
    "refcoco": refcoco,
    "refcoco-qwen": refcoco_files,
    "amber-words": amber_files,
}
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "pope": (
        "test-0.parquet",
        {
            "question_id": "1",
            "question": "Q",
            "answer": "no",
            "image_source": "x",
            "category": "random",
        },
    ),
    "scienceqa": (
        "test-0.parquet",
        {"question": "Q", "choices": ["a", "b"], "answer": 1, "hint": "h"},
    ),
    "textvqa": (
        "validation-0.parquet",
        {
            "image_id": "i",
            "question_id": 3,
            "question": "Q",
            "answers": ["a"] * 10,
            "ocr_tokens": ["t"],
        },
    ),
    "chair": ("test-0.parquet", {"question_id": 7, "gt_object": ["dog"]}),
    "gqa": (
        "testdev_balanced_instructions/testdev-0.parquet",
        {
            "id": "1",
            "imageId": "1",
            "question": "Q",
            "answer": "A",
            "types": {"structural": "query"},
            "isBalanced": True,
        },
    ),
    "mme": (
        "test-0.parquet",
        {"question_id": "OCR/1", "question": "Q", "answer": "Yes", "category": "OCR"},
    ),
    "chartqa": ("test-0.parquet", {"type": "human_test", "question": "Q", "answer": "1"}),
    "docvqa": (
        "DocVQA/validation-0.parquet",
        {"questionId": "1", "question": "Q", "answers": ["a"]},
    ),
    "ocrbench": (
        "test-0.parquet",
        {"dataset": "svt", "question": "Q", "question_type": "Doc-oriented VQA", "answer": ["a"]},
    ),
    "mmbench": (
        "dev-0.parquet",
        {
            "index": 1,
            "question": "Q",
            "hint": "h",
            "answer": "A",
            "A": "x",
            "B": "y",
            "C": "z",
            "D": "nan",
            "L2-category": "logic_reasoning",
        },
    ),
    "ai2d": ("test-0.parquet", {"question": "Q", "options": ["a", "b"], "answer": "1"}),
    "realworldqa": ("test-0.parquet", {"question": "Q", "answer": "A"}),
    "vizwiz": ("val-0.parquet", {"question_id": "1", "question": "Q", "answers": ["a"] * 10}),
    "refcoco": (
        "val-0.parquet",
        {"question_id": "1", "answer": ["dog"], "bbox": [0.0, 0.0, 1.0, 1.0]},
    ),
    "mmstar": ("mmstar.parquet", {"index": 1, "question": "Q", "answer": "A", "category": "math"}),
}

ODD = st.sampled_from(
    [None, True, -1, 10**18, 10**30, 1.5, float("nan"), "", "42²", "9" * 5000, "\0", "a/../\0b", "x" * 300,
     [], ["a", None], [[1]], {}, {"a": 1}]
)  # fmt: skip


TEXTS = (".csv", ".json", ".jsonl", ".p", ".tsv", ".txt")


def readable(task: str, folder: Path) -> None:
    """The items can be read and kept in a run, or a DataError says why not, shortly."""
    try:
        items = get_task(task).read(folder)
        items_table(task, items)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(st.sampled_from(sorted(OFFICIAL)), st.integers(0, 9), st.data())
def test_official_files(tmp_path: Path, task: str, which: int, data: st.DataObject) -> None:
    folder = tmp_path / task
    OFFICIAL[task](folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix in TEXTS and p.is_file())
    path = paths[which % len(paths)]
    raw = path.read_bytes()
    if data.draw(st.booleans()) or path.suffix not in (".json", ".jsonl"):
        start = data.draw(st.integers(0, len(raw)))
        new = data.draw(
            st.sampled_from([b"", b"\xff", b"[" * 2000, b"9" * 5000, b'"\\ud800"', b"\0"])
        )
        path.write_bytes(raw[:start] + new + raw[start + data.draw(st.integers(0, 3)) :])
    else:
        text = raw.decode()
        by_line = path.suffix == ".jsonl" or text.startswith('{"question_id"')
        lines = text.splitlines() if by_line else [text]
        values = [json.loads(line) for line in lines]
        keys = sorted({key for one in values for key in keys_of(one)})
        key, new = data.draw(st.sampled_from(keys)), data.draw(ODD)
        changed = damaged(values, key, new, [data.draw(st.integers(0, 2))])
        path.write_text("\n".join(json.dumps(one) for one in changed))
    readable(task, folder)


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for one in value.values() for key in keys_of(one)}
    return {key for one in value for key in keys_of(one)} if isinstance(value, list) else set()


@pytest.mark.parametrize(
    ("task", "key"), [("mmbench", "answer"), ("gqa", "imageId"), ("mmstar", "category")]
)
def test_a_value_of_any_length_is_named_shortly(tmp_path: Path, task: str, key: str) -> None:
    name, row = HUB[task]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if task == "gqa":
        shown = row | {"image": files.hub_image((1, 2, 3))}
        files.parquet(tmp_path / name.replace("instructions", "images"), [shown])
    files.parquet(tmp_path / name, [row | {"image": files.hub_image((1, 2, 3)), key: "9" * 5000}])
    with pytest.raises(DataError, match="999... [(]5002 characters[)]") as told:
        get_task(task).read(tmp_path)
    assert len(str(told.value)) < 1000


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(st.sampled_from(sorted(HUB)), st.data())
def test_hub_files(tmp_path: Path, task: str, data: st.DataObject) -> None:
    folder = tmp_path / task
    folder.mkdir(exist_ok=True)
    name, row = HUB[task]
    row = row | {"image": files.hub_image((1, 2, 3))}
    key = data.draw(st.sampled_from(sorted(row)))
    new = data.draw(ODD)
    changed = {k: v for k, v in (row | {key: new}).items() if new is not None or k != key}
    (folder / name).parent.mkdir(exist_ok=True)
    if task == "gqa":
        files.parquet(folder / name.replace("instructions", "images"), [row])
    try:
        pq.write_table(pa.Table.from_pylist([changed]), folder / name)
    except (pa.ArrowException, OverflowError, TypeError):
        return  # nothing that a parquet file can hold
    if data.draw(st.booleans()):
        whole = (folder / name).read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    readable(task, folder)
