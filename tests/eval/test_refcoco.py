"""RefCOCO: boxes as four families write them, overlap, and files, the official pickle included."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import files
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import sum_counts
from vllm_flow.eval.tasks.boxes import CONVENTIONS, Box, overlap, parse_box
from vllm_flow.eval.tasks.reading import DataError

# Width 400, height 200: LLaVA's square has 100 empty rows above and below.
BOXES = [
    ("llava", "[0.25, 0.5, 0.5, 0.75]", (100, 100, 200, 200)),
    ("llava", "It is [0.25,0.50, 0.5 ,0.75], there.", (100, 100, 200, 200)),
    ("llava", "[0, 0.25, 1, 0.75]", (0, 0, 400, 200)),
    ("llava", "[0.1, 0.2] [0.25, 0.5, 0.5, 0.75] [0, 0, 1, 1]", (100, 100, 200, 200)),
    ("llava", "[-0.1, 0.25, 1, 0.75]", (-40, 0, 400, 200)),
    ("llava", "(0.25, 0.5), (0.5, 0.75)", None),
    ("llava", "0.25, 0.5, 0.5, 0.75", None),
    ("llava", "[.25, .5, .5, .75]", None),
    ("llava", "", None),
    ("internvl", "<ref>dog</ref><box>[[250, 500, 500, 1000]]</box>", (100, 100, 200, 200)),
    ("internvl", "[[250,500,500,1000],[0,0,1,1]]", (100, 100, 200, 200)),
    ("qwen", "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(250,500),(500,1000)<|box_end|>",
     (100, 100, 200, 200)),
    ("qwen", "(250, 500), (500, 1000)", (100, 100, 200, 200)),
    ("qwen", "[250, 500, 500, 1000]", None),
    ("qwen3", '```json\n[{"bbox_2d": [250, 500, 500, 1000], "label": "dog"}]\n```', (100, 100, 200, 200)),
]  # fmt: skip


@pytest.mark.parametrize(("convention", "text", "box"), BOXES)
def test_boxes(convention: str, text: str, box: tuple | None) -> None:
    found = parse_box(text, convention, 400, 200)
    assert (found and tuple(found)) == (box and pytest.approx(box))


def test_a_tall_picture_is_padded_left_and_right() -> None:
    assert parse_box("[0.25, 0.5, 0.5, 0.75]", "llava", 200, 400) == (0, 200, 100, 300)
    assert parse_box("[0.25, 0.5, 0.5, 0.75]", "llava", 201, 400) == (1, 200, 101, 300), (
        "LLaVA's expand2square divides in whole pixels"
    )


# box_iou of eval_mm/evaluate_grounding.py.
OVERLAPS = [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1.0), ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3), ((0, 0, 2, 2), (0, 0, 1, 2), 0.5),
    ((0, 0, 1, 1), (1, 0, 2, 1), 0.0), ((0, 0, 1, 1), (5, 5, 6, 6), 0.0), ((0, 0, 0, 0), (0, 0, 1, 1), 0.0),
    ((2, 2, 0, 0), (0, 0, 2, 2), 0.0), ((2, 0, 0, 2), (0, 0, 2, 2), 0.0), ((-2, 0, 2, 2), (0, 0, 2, 2), 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "share"), OVERLAPS)
def test_overlap(one: tuple, other: tuple, share: float) -> None:
    assert overlap(Box(*one), Box(*other)) == pytest.approx(share)
    assert overlap(Box(*other), Box(*one)) == pytest.approx(share)


side = st.integers(0, 12)


@given(st.lists(side, min_size=8, max_size=8))
def test_overlap_by_counting_cells(sides: list[int]) -> None:
    def cells(box: Box) -> set[tuple[int, int]]:
        return {
            (x, y) for x in range(int(box.left), int(box.right)) for y in range(int(box.top), int(box.bottom))
        }  # fmt: skip

    one, other = Box(*sides[:4]), Box(*sides[4:])
    a, b = cells(one), cells(other)
    assert overlap(one, other) == pytest.approx(len(a & b) / len(a | b) if a and b else 0.0)


def official(folder: Path) -> Path:
    instances = {
        "images": [{"id": 5, "file_name": "COCO_train2014_5.jpg", "width": 400, "height": 200}],
        "annotations": [{"id": 9, "bbox": [100.0, 100, 100, 100]}],
    }
    files.json_file(folder / "instances.json", instances)
    sentences = [{"sent_id": n, "sent": f"dog {n}", "tokens": ["dog"]} for n in (1, 2)]
    refs = [
        {"ref_id": n, "ann_id": 9, "image_id": 5, "split": split, "sentences": sentences}
        for n, split in enumerate(("train", "val", "testB"))
    ]
    for ref in refs:
        ref["sentences"] = [s | {"sent_id": s["sent_id"] + 10 * ref["ref_id"]} for s in sentences]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    files.image_file(folder / "train2014/COCO_train2014_5.jpg")
    return folder


def test_official_files_and_scores(tmp_path: Path) -> None:
    task = get_task("refcoco")
    items = task.read(official(tmp_path))
    assert [(i.id, i.group) for i in items] == [
        ("11", "val"), ("12", "val"), ("21", "testB"), ("22", "testB"),
    ]  # fmt: skip
    assert items[0].text == (
        "Please provide the bounding box coordinate of the region this sentence describes: dog 1"
    )
    assert items[0].image == str(tmp_path / "train2014/COCO_train2014_5.jpg")
    said = ["[0.25, 0.5, 0.5, 0.75]", "[0.25, 0.5, 0.5, 0.62]", "a dog", "[0.25, 0.5, 0.5, 0.63]"]
    scored = [task.score(i, text) for i, text in zip(items, said, strict=True)]
    assert [one.score for one in scored] == [1.0, 0.0, 0.0, 1.0], "one half is enough, 48 % are not"
    assert [one.unclear for one in scored] == [False, False, True, False]
    found = task.metrics(sum_counts(scored))
    assert (found["accuracy"], found["accuracy_val"], found["accuracy_testB"]) == (0.5, 0.5, 0.5)
    assert found["mean_iou"] == pytest.approx((1 + 0.48 + 0 + 0.52) / 4)


def test_one_half_exactly_is_right(tmp_path: Path) -> None:
    item = get_task("refcoco").read(official(tmp_path))[0]
    assert get_task("refcoco-qwen").score(item, "(250,500),(500,750)").score == 1.0
    assert get_task("refcoco-qwen").score(item, "(250,500),(500,749)").score == 0.0


class Payload:
    """A pickle that runs a command where it is read carelessly."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.file),))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    official(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Payload(tmp_path / "ran")], protocol=2))
    with pytest.raises(DataError, match=r"not a pickle of plain values \(it names .*mkdir\)"):
        get_task("refcoco").read(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "refs(unc).p").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a pickle"):
        get_task("refcoco").read(tmp_path)


def test_other_layouts(tmp_path: Path) -> None:
    task = get_task("refcoco-internvl")
    line = {
        "image": "data/refcoco/COCO_train2014_5.jpg", "sent": "dog 1", "bbox": [100, 100, 200, 200],
        "width": 400, "height": 200,
    }  # fmt: skip
    files.json_lines(tmp_path / "a/refcoco+_testA.jsonl", [line, line])
    items = task.read(tmp_path / "a")
    assert [(i.id, i.group) for i in items] == [("testA/0", "testA"), ("testA/1", "testA")]
    assert items[0].text.endswith(
        "coordinates of the region this sentence describes: <ref>dog 1</ref>"
    )
    assert task.score(items[0], "[[250, 500, 500, 1000]]").score == 1.0
    table = [
        {"question_id": "COCO_5", "answer": ["dog", "the dog"], "bbox": [0.0, 0.0, 3.0, 1.0],
         "image": files.hub_image((1, 2, 3))}
    ]  # fmt: skip
    files.parquet(tmp_path / "b/val-0.parquet", table)
    hub = task.read(tmp_path / "b")
    assert [i.id for i in hub] == ["val/COCO_5/0", "val/COCO_5/1"]
    assert hub[0].truth["box"] == [0, 0, 3, 1] and hub[0].truth["size"] == [3, 2]
    files.parquet(tmp_path / "b/val-0.parquet", [table[0] | {"bbox": [1.0, 2.0]}])
    with pytest.raises(DataError, match="row 0: the box is .*, not four numbers"):
        task.read(tmp_path / "b")
    (tmp_path / "a/empty").mkdir()
    with pytest.raises(DataError, match="neither refs"):
        task.read(tmp_path / "a/empty")


def test_variants_say_how_pictures_are_prepared() -> None:
    assert get_task("refcoco").image_preparation == "pad", "its boxes are of the padded square"
    for name in set(CONVENTIONS) - {"llava"}:
        assert get_task(f"refcoco-{name}").image_preparation == "plain"
