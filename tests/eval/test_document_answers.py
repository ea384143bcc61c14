"""DocVQA, InfoVQA, OCRBench: rules case by case, both layouts of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import files
from tests.eval.test_short_answers import SHORT, metrics_of
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.anls import anls, distance
from vllm_flow.eval.tasks.base import Item
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError

# ANLS: eval_mm/infographicsvqa_eval.py of Qwen-VL, the competition's script.
ANLS = [
    ("nokia", ["nokia"], 1.0), ("NOKIA", ["nokia"], 1.0), ("nokias", ["nokia"], 5 / 6), ("noki", ["nokia"], 0.8),
    ("abcd", ["abxx"], 0.5), ("abcd", ["axxx"], 0.0), ("abcde", ["abxxx"], 0.0), ("x", ["abcdef", "x"], 1.0),
    ("", ["a"], 0.0), ("", [""], 1.0), (" a  b ", ["a b"], 1.0), ("a\nb", ["a b"], 1.0),
    # The distance is of folded texts, the length is not: spaces lengthen what a mistake is divided by.
    ("ab", ["cb"], 0.5), ("ab  ", ["cb"], 0.75), ("xb", ["a      b"], 0.75),
    # In upper case a sharp s is two letters.
    ("ß", ["s"], 0.5), ("ss", ["ß"], 0.0), ("aß", ["ab"], 2 / 3), ("$ 5", ["$5"], 2 / 3),
]  # fmt: skip


@pytest.mark.parametrize(("text", "references", "expected"), ANLS)
def test_anls(text: str, references: list[str], expected: float) -> None:
    assert anls(text, references) == pytest.approx(expected)


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_distance(one: str, other: str) -> None:
    """Levenshtein's, by its recursive definition."""
    known: dict[tuple[str, str], int] = {}

    def steps(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        if (a, b) not in known:
            change = steps(a[1:], b[1:]) + (a[0] != b[0])
            known[a, b] = min(change, steps(a[1:], b) + 1, steps(a, b[1:]) + 1)
        return known[a, b]

    assert distance(one, other) == steps(one, other)


@pytest.mark.parametrize(
    ("name", "file", "picture", "folder", "hub"),
    [
        ("docvqa", "val_v1.0_withQT.json", "image", "", "DocVQA"),
        ("docvqa", "val/val_v1.0.json", "image", "val/", "DocVQA"),
        ("infovqa", "infographicsVQA_val_v1.0_withQT.json", "image_local_name",
         "infographicsvqa_images/", "InfographicVQA"),
    ],
)  # fmt: skip
def test_document_layouts(
    tmp_path: Path, name: str, file: str, picture: str, folder: str, hub: str
) -> None:
    rows = [
        {
            "questionId": n,
            "question": f"Q{n}?",
            "answers": ["Five", "5"],
            picture: "documents/p.png",
        }
        for n in (337, 338)
    ]
    files.json_file(tmp_path / "a" / file, {"dataset_name": "x", "data": rows})
    files.image_file(tmp_path / "a" / folder / "documents/p.png")
    items = get_task(name).read(tmp_path / "a")
    assert [(i.id, i.text) for i in items] == [("337", "Q337?" + SHORT), ("338", "Q338?" + SHORT)]
    assert load_image(items[0].image).size == (3, 2)
    assert metrics_of(name, [(items[0], "five"), (items[1], "fi")]) == {"anls": 0.75}
    table = [
        {"questionId": str(row["questionId"]), "question": row["question"], "answers": row["answers"],
         "image": files.hub_image((1, 1, 1))} for row in rows
    ]  # fmt: skip
    path = files.parquet(tmp_path / f"b/{hub}/validation-0.parquet", table)
    read = get_task(name).read(tmp_path / "b")
    assert [(i.id, i.text, i.truth["answers"]) for i in read] == [
        (i.id, i.text, i.truth["answers"]) for i in items
    ]
    assert read[0].picture_of == read[1].picture_of
    files.parquet(path, [table[0], table[1] | {"answers": None}])
    with pytest.raises(DataError, match="row 1: 'answers' is null"):
        get_task(name).read(tmp_path / "b")


# OCRBench: example.py of Yuliang-Liu/MultimodalOCR.
OCR = [
    ("CENTRE", ["centre"], "IIIT5K", 1), ("the Centre.", ["CENTRE"], "IIIT5K", 1), ("cent re", ["centre"], "IIIT5K", 0),
    ("a\nb", ["a b"], "IIIT5K", 1), ("a b", ["a\nb"], "IIIT5K", 1), ("x", [" x "], "IIIT5K", 1),
    ("ab", ["a b"], "IIIT5K", 0), ("x", ["y", "X"], "docVQA", 1), ("anything", [""], "docVQA", 1),
    ("", ["x"], "docVQA", 0),
    ("x ^ 2", ["x^2"], "HME100k", 1), ("X^2", ["x^2"], "HME100k", 0), ("x^\n2", ["x ^ 2"], "HME100k", 1),
    ("= x ^ 2 ;", ["x^2"], "HME100k", 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answers", "dataset", "score"), OCR)
def test_ocrbench_rule(text: str, answers: list[str], dataset: str, score: int) -> None:
    item = Item("1", "", None, {"answers": answers, "dataset": dataset}, "formulas")
    assert get_task("ocrbench").score(item, text).score == score


def test_ocrbench_layouts(tmp_path: Path) -> None:
    kinds = ["Regular Text Recognition", "Digit String Recognition", "Doc-oriented VQA"]
    rows = [
        {"dataset_name": "svt", "id": 7, "image_path": f"svt/{n}.png", "question": f"Q{n}", "type": kind,
         "answers": "ten" if n else ["ten", "10"]}
        for n, kind in enumerate(kinds)
    ]  # fmt: skip
    path = files.json_file(tmp_path / "a/OCRBench/OCRBench.json", rows)
    files.image_file(tmp_path / "a/OCRBench_Images/svt/0.png")
    items = get_task("ocrbench").read(tmp_path / "a")
    assert load_image(items[0].image).size == (3, 2)
    assert items[0].text == "Q0" + SHORT and items[0].truth["answers"] == ["ten", "10"]
    found = metrics_of("ocrbench", list(zip(items, ["10", "10", "it is Ten."], strict=True)))
    assert found["score"] == pytest.approx(2 / 3)
    assert (found["recognition"], found["document_vqa"], found["scene_vqa"]) == (0.5, 1.0, 0.0)
    assert get_task("ocrbench").full_marks["score"] == 1000
    assert sum(get_task("ocrbench").full_marks.values()) == 2000, "the parts add up to the whole"
    table = [
        {"dataset": r["dataset_name"], "question": r["question"], "question_type": r["type"],
         "answer": list([r["answers"]] if isinstance(r["answers"], str) else r["answers"]),
         "image": files.hub_image((1, 2, 3))} for r in rows
    ]  # fmt: skip
    files.parquet(tmp_path / "b/data/test-0.parquet", table)
    hub = get_task("ocrbench").read(tmp_path / "b")
    assert [(i.id, i.text, i.group) for i in hub] == [(i.id, i.text, i.group) for i in items]
    files.json_file(path, [rows[0] | {"type": "x"}])
    with pytest.raises(DataError, match="record 0: unknown type of question 'x'"):
        get_task("ocrbench").read(tmp_path / "a")
