"""GQA, ChartQA, RealWorldQA, VizWiz: rules case by case, both layouts of files.

Each rule is written down a second time, from its published script, where a second way of writing it exists.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import files
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import Item, sum_counts
from vllm_flow.eval.tasks.chartqa import relaxed_correct
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError
from vllm_flow.eval.tasks.vizwiz import normalise, soft_accuracy

SHORT = "\nAnswer the question using a single word or phrase."
QWEN = "\nPlease try to answer the question with short words or phrases if possible."


def metrics_of(name: str, pairs: list[tuple[Item, str]]) -> dict:
    task = get_task(name)
    return task.metrics(sum_counts(task.together(task.score(item, text) for item, text in pairs)))


# GQA: LLaVA's convert_gqa_for_eval.py (rstrip("."), lower), then GQA's eval.py (equality).
@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("yes", True), ("Yes", True), ("Yes.", True), ("yes...", True), ("yes!", False), ("yes. ", False),
        (" yes", False), ("yes, it is", False), ("", False), ("YES.", True), (".yes", False),
    ],
)  # fmt: skip
def test_gqa_rule(text: str, right: bool) -> None:
    item = Item("1", "", None, {"answer": "yes"}, "binary")
    assert get_task("gqa").score(item, text).score == right


def gqa_question(image: str, question: str, answer: str, structural: str) -> dict:
    types = {"structural": structural, "semantic": "obj", "detailed": "x"}
    return {
        "imageId": image, "question": question, "answer": answer, "types": types, "isBalanced": True,
    }  # fmt: skip


def test_gqa_layouts(tmp_path: Path) -> None:
    asked = {
        "01": gqa_question("n1", "Is it red?", "yes", "verify"),
        "02": gqa_question("n1", "What is it?", "car", "query"),
        "03": {
            k: v
            for k, v in gqa_question("n2", "Which?", "left", "choose").items()
            if k != "isBalanced"
        },
        "04": gqa_question("n2", "?", "x", "query") | {"isBalanced": False},
    }
    files.json_file(tmp_path / "a/testdev_balanced_questions.json", asked)
    files.image_file(tmp_path / "a/images/n1.jpg")
    items = get_task("gqa").read(tmp_path / "a")
    assert [(i.id, i.group) for i in items] == [("01", "binary"), ("02", "open"), ("03", "binary")]
    assert items[0].text == "Is it red?" + SHORT
    assert items[0].image == str(tmp_path / "a/images/n1.jpg")
    assert items[0].picture_of == items[1].picture_of != items[2].picture_of
    assert get_task("gqa").asked_as("qwen2-vl").read(tmp_path / "a")[0].text == "Is it red?" + QWEN
    assert get_task("gqa").asked_as("qwen-vl").read(tmp_path / "a")[0].text == "Is it red? Answer:"
    found = metrics_of("gqa", [(items[0], "Yes"), (items[1], "Car."), (items[2], "right")])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["accuracy_open"], found["accuracy_binary"]) == (1.0, 0.5)
    rows = [{"id": key, "isBalanced": True, **one} for key, one in asked.items()]
    files.parquet(tmp_path / "b/testdev_balanced_instructions/testdev-0.parquet", rows)
    with pytest.raises(DataError, match="no testdev_balanced_images"):
        get_task("gqa").read(tmp_path / "b")
    pictures = [{"id": f"n{n}", "image": files.hub_image((n, 0, 0))} for n in (2, 1)]
    files.parquet(tmp_path / "b/testdev_balanced_images/testdev-0.parquet", pictures)
    hub = get_task("gqa").read(tmp_path / "b")
    assert [(i.id, i.text, i.truth, i.group) for i in hub] == [
        (i.id, i.text, i.truth, i.group) for i in items
    ]
    assert load_image(hub[2].image).getpixel((0, 0)) == (2, 0, 0)


# ChartQA: relaxed_correctness of google-research/pix2struct, metrics.py.
CHARTS = [
    ("5", "5", True), ("5.25", "5", True), ("5.2501", "5", False), ("4.75", "5", True), ("4.74", "5", False),
    ("-5", "5", False), ("-5.1", "-5", True), ("5%", "5", False), ("5%", "0.05", True), ("5%", "5%", True),
    ("5", "5%", False), ("0", "0", True), ("0.0", "0", False), ("0", "0.0", False), ("1,000", "1000", False),
    ("1_000", "1000", True), ("1e3", "1000", True), (" 5 ", "5", True), ("5.", "5", True), ("$5", "5", False),
    ("nan", "5", False), ("inf", "5", False), ("5", "nan", False), ("nan", "nan", False), ("inf", "inf", False),
    ("Yes", "yes", True), ("yes.", "yes", False), ("yes ", "yes", False), ("", "", True), ("", "5", False),
    ("five", "5", False), ("5%%", "0.05", True), ("%", "%", True), ("5 %", "0.05", True), ("2019", "2015", True),
    ("[1, 2]", "[1, 2]", True), ("5", "", False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "target", "right"), CHARTS)
def test_chartqa_rule(text: str, target: str, right: bool) -> None:
    assert relaxed_correct(text, target) is right


@given(st.floats(1e-6, 1e6), st.floats(-0.2, 0.2))
def test_chartqa_five_per_cent_are_of_the_target(target: float, change: float) -> None:
    away = abs(target * (1 + change) - target) / target
    if not math.isclose(away, 0.05, rel_tol=1e-6):
        assert relaxed_correct(repr(target * (1 + change)), repr(target)) == (away < 0.05)


def test_chartqa_layouts(tmp_path: Path) -> None:
    for group in ("human", "augmented"):
        rows = [{"imgname": f"{n}.png", "query": f"{group} {n}?", "label": str(n)} for n in (1, 2)]
        files.json_file(tmp_path / f"a/test/test_{group}.json", rows)
    files.image_file(tmp_path / "a/test/png/1.png")
    items = get_task("chartqa").read(tmp_path / "a")
    assert [i.id for i in items] == ["human/0", "human/1", "augmented/0", "augmented/1"]
    assert items[0].text == "human 1?\nAnswer the question with a single word."
    assert load_image(items[0].image).size == (3, 2)
    found = metrics_of("chartqa", list(zip(items, ["1", "9", "1.01", "2"], strict=True)))
    assert found == {"accuracy": 0.75, "accuracy_human": 0.5, "accuracy_augmented": 1.0}
    rows = [
        {"type": f"{i.group}_test", "question": i.truth["question"], "answer": i.truth["answer"],
         "image": files.hub_image((n // 2, 0, 0))}
        for n, i in enumerate(items)
    ]  # fmt: skip
    path = files.parquet(tmp_path / "b/test-0.parquet", rows)
    hub = get_task("chartqa").read(tmp_path / "b")
    assert [i.text for i in hub] == [i.text for i in items]
    assert hub[0].picture_of == hub[1].picture_of != hub[2].picture_of, "embedded twice"
    files.parquet(path, [rows[0] | {"type": "val"}])
    with pytest.raises(DataError, match="row 0: unknown type 'val'"):
        get_task("chartqa").read(tmp_path / "b")


# RealWorldQA: lmms-eval's first rule, pred.lower().strip().rstrip(".") == answer.lower().
@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("A", "A", 1), ("a.", "A", 1), (" A. ", "A", 1), ("A. ", "A", 1), ("A. Left", "A", 0), ("(A)", "A", 0),
        ("Two", "two", 1), ("2", "two", 0), ("No", "no ", 1), ("", "A", 0), ("A .", "A", 0),
    ],
)  # fmt: skip
def test_realworldqa_rule(text: str, answer: str, score: int) -> None:
    item = Item("1", "", None, {"answer": answer})
    assert get_task("realworldqa").score(item, text).score == score


def test_realworldqa_layouts(tmp_path: Path) -> None:
    request = "\n\nA. x\nB. y\nPlease answer directly with only the letter of the correct option."
    rows = [{"image": f"{n}.webp", "question": f"Q{n}{request}", "answer": "A"} for n in range(3)]
    files.json_lines(tmp_path / "a/annotations.jsonl", rows)
    items = get_task("realworldqa").read(tmp_path / "a")
    assert [i.text for i in items] == [row["question"] for row in rows]
    assert items[2].image == str(tmp_path / "a/2.webp")
    assert metrics_of("realworldqa", [(items[0], "A"), (items[1], "B")]) == {"accuracy": 0.5}
    for part in (0, 1):
        table = [row | {"image": files.hub_image((n, part, 0))} for n, row in enumerate(rows)]
        files.parquet(tmp_path / f"b/test-{part}.parquet", table)
    hub = get_task("realworldqa").read(tmp_path / "b")
    assert [i.id for i in hub] == [f"row/{n}" for n in range(6)]
    assert [load_image(i.image).getpixel((0, 0))[:2] for i in hub] == [
        (n, part) for part in (0, 1) for n in range(3)
    ]


# VizWiz: the challenge's VQAEval.
VIZWIZ = [
    ("", ""), ("Nokia", "nokia"), ("the Nokia", "nokia"), ("x\ny", "x y"), ("x-y", "x y"), ("x - y", "x y"),
    ("x,y", "x y"), ("x, y", "x y"), ("what?", "what"), ("two", "2"), ("TEN", "10"), ("none", "0"),
    # A number with a comma in it: every mark goes, wherever it stands.
    ("1,000-x", "1000x"), ("1,000", "1000"), ("x-y z,w", "x y z w"), ("1,x-y", "1 x y"),
    # No space before 's, and typographic apostrophes in the table.
    ("joe's", "joe's"), ("dont", "don’t"), ("don't", "don't"), ("don’t", "don’t"), ("cant", "can't"),
    ("weve", "we've"), ("wheres", "where's"), ("couldn'tve", "couldn’t’ve"), ("couldnt’ve", "couldn’t’ve"),
    ("couldnt've", "couldnt've"), ("whats", "what’s"), ("maam", "ma’am"), ("oclock", "o’clock"),
    ("5.5", "5.5"), ("5.", "5"), ("a.", ""), ("x.y", "xy"), ("." * 33 + "x", ".x"), ("un suitable", "un suitable"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), VIZWIZ)
def test_vizwiz_normalised(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_vizwiz_scores() -> None:
    for matches, score in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        answers = ["nokia"] * matches + ["x"] * (10 - matches)
        assert soft_accuracy("Nokia.", answers) == pytest.approx(score)
    assert soft_accuracy("dont", ["don't"] * 10) == 0.0, "the table's apostrophe is another one"
    assert soft_accuracy("Nokia", ["Nokia"] * 10) == 0.0, (
        "the annotators' answers are not normalised"
    )


def test_vizwiz_layouts(tmp_path: Path) -> None:
    answers = [{"answer": "grey", "answer_confidence": "yes"}] * 10
    rows = [
        {"image": f"VizWiz_val_{n:08d}.jpg", "question": "what colour is this?", "answers": answers,
         "answer_type": kind, "answerable": 1}
        for n, kind in enumerate(["other", "yes/no"])
    ]  # fmt: skip
    files.json_file(tmp_path / "a/Annotations/val.json", rows)
    files.image_file(tmp_path / "a/val/VizWiz_val_00000001.jpg")
    with pytest.raises(DataError, match="neither val.json"):
        get_task("vizwiz").read(tmp_path)
    items = get_task("vizwiz").read(tmp_path / "a")
    assert items[0].text == (
        "what colour is this?\nWhen the provided information is insufficient, respond with "
        "'Unanswerable'." + SHORT
    )
    assert get_task("vizwiz").asked_as("qwen2-vl").read(tmp_path / "a")[0].text.endswith("?" + QWEN)
    found = metrics_of("vizwiz", [(items[0], "Grey"), (items[1], "blue")])
    assert (found["accuracy"], found["accuracy_other"], found["accuracy_yes_no"]) == (0.5, 1.0, 0.0)
    table = [
        {"question_id": row["image"][:-4], "question": row["question"], "answers": ["grey"] * 10,
         "image": files.hub_image((n, 0, 0))} for n, row in enumerate(rows)
    ]  # fmt: skip
    files.parquet(tmp_path / "b/val-0.parquet", table)
    hub = get_task("vizwiz").read(tmp_path / "b")
    assert hub[1].id == "VizWiz_val_00000001" and hub[1].group == ""
    assert metrics_of("vizwiz", [(hub[0], "grey")])["accuracy"] == 1.0
