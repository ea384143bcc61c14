"""POPE: the parse rule case by case, the metrics against published counts, both layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import files
from vllm_flow.eval.tasks.base import sum_counts
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.pope import CATEGORIES, SUFFIX, TASK, parse_yes_no
from vllm_flow.eval.tasks.reading import DataError

NO = [
    "No", "no", "not", "No.", "no.", "not.", "No, there is no sink.", "No,", ",No", "N,o", "n,o,t", "no,",
    "No ", " No", "  no  ", "There is no sink", "There is not a sink", "There is not, I think, a sink",
    "It is not there.", "not there", "I do not know", "Yes no", "yes, no", "no yes", "Yes and not",
    "No\tno no", "maybe not", "Is not. Yes", "No. Yes.", "No.Yes", "not.yes", "There is no.", "a no a",
    "no dog,", "No dog", "No;  no", "Yes, there is no doubt", "Not no", "NO no", "isn't not", "no\u00a0 no",
    "1 no 2", "no, No, not", "No ... yes", "no sink in the image, yes", "I see no. I see yes.", "-- No",
    "not a", "image: no", "Answer: No", "'no' no", "no\n no", "no, \n", "No ,", "No ,.", ",,no,,",
]  # fmt: skip
YES = [
    "", " ", ".", ",", ", .", "\n", "Yes", "yes", "YES", "Yes.", "yes.", "y", "Y", "NO", "Not", "NOT", "nO",
    "nOt", "No!", "No?", "No;", "No:", "No-", "no!", "no?", "not!", "No\n", "\nNo", "No\t", "No\nno",
    "no\nyes", "isn't", "There isn't a sink", "cannot", "can't", "none", "None", "nothing", "nope", "nah",
    "never", "without", "No\u00a0", "(No)", '"No"', "'no'", "*No*", "No/Yes", "No;there", "Nope.", ".No",
    ". No", "Yes. No", "Yes. There is no sink.", "Yes.no", "yes .no", "There is a sink. It is not big.",
    "...no", "Yes, there is.", "North", "note", "knot", "know", "Noo", "nno", "no_", "no's", "a,no", "no,a",
    "0", "false", "False", "nein", "non", "n o", "No\u200b", "Ｎo", "\ufeffNo", "No…", "no。", "noyes",
    "The answer is: NO", "Not really", "I doubt it", "unsure", "No\r", "no\x0b", "\tno",
]  # fmt: skip


@pytest.mark.parametrize("text", NO)
def test_no(text: str) -> None:
    assert parse_yes_no(text) == "no"


@pytest.mark.parametrize("text", YES)
def test_yes(text: str) -> None:
    assert parse_yes_no(text) == "yes"


def by_hand(text: str) -> str:
    """The rule again, one character at a time."""
    piece, pieces = "", []
    for character in text:
        if character == ".":
            break
        if character == " ":
            pieces.append(piece)
            piece = ""
        elif character != ",":
            piece += character
    return "no" if any(p in ("No", "no", "not") for p in [*pieces, piece]) else "yes"


@given(st.text(alphabet="NnOotT ,.!\n\t'y", max_size=12) | st.text(max_size=20))
def test_the_rule_character_by_character(text: str) -> None:
    assert parse_yes_no(text) == by_hand(text)


def test_official_layout(tmp_path: Path) -> None:
    files.pope_labels(tmp_path / "coco")
    files.image_file(tmp_path / "val2014/COCO_val2014_000000000000.jpg", (9, 8, 7))
    items = TASK.read(tmp_path)
    assert len(items) == len({item.id for item in items}) == 12
    assert [item.group for item in items] == [c for c in CATEGORIES for _ in range(4)]
    assert items[0].text == "Is there a sink in the image?" + SUFFIX
    assert SUFFIX == "\nAnswer the question using a single word or phrase."
    assert items[5].id == "popular/2"
    assert items[5].truth["label"] == "yes" and items[6].truth["label"] == "no"
    assert load_image(items[0].image).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize(
    ("said", "unclear"),
    [
        ("No", False),
        ("yes", False),
        ("Yes, there is.", False),
        ("Maybe", True),
        ("", True),
        ("NO", True),
    ],
)
def test_answers_without_either_word_are_unclear(tmp_path: Path, said: str, unclear: bool) -> None:
    item = TASK.read(files.pope_labels(tmp_path))[0]
    assert TASK.score(item, said).unclear == unclear


@pytest.mark.parametrize("folder", [".", "images", "coco/val2014"])
def test_pictures_are_found(tmp_path: Path, folder: str) -> None:
    files.pope_labels(tmp_path)
    files.image_file(tmp_path / folder / "COCO_val2014_000000000000.jpg")
    assert load_image(TASK.read(tmp_path)[0].image).size == (3, 2)


def hub_rows() -> list[dict]:
    return [
        {
            "question_id": str(i + 1),
            "question": f"Is there a {name} in the image?",
            "answer": "yes" if i < 2 else "no",
            "image_source": "COCO_val2014_000000000007",
            "image": files.hub_image((i, 0, 0)),
            "category": category,
        }
        for category in ("adversarial", "popular", "random")
        for i, name in enumerate(files.POPE_OBJECTS[category])
    ]


def test_hub_layout(tmp_path: Path) -> None:
    files.parquet(tmp_path / "data/test-00000-of-00002-ab.parquet", hub_rows()[:5])
    files.parquet(tmp_path / "data/test-00001-of-00002-cd.parquet", hub_rows()[5:])
    # The same questions again, by category, as the hub's second configuration has them.
    for n, category in enumerate(("adversarial", "popular", "random")):
        path = tmp_path / f"Full/{category}-00000-of-00001.parquet"
        files.parquet(path, hub_rows()[4 * n : 4 * n + 4])
    items = TASK.read(tmp_path)
    assert [item.group for item in items] == [c for c in CATEGORIES for _ in range(4)]
    assert [item.id for item in items[:4]] == [f"random/{n}" for n in (1, 2, 3, 4)]
    assert items[0].truth["image"] == "COCO_val2014_000000000007.jpg"
    reds = [load_image(item.image).getpixel((0, 0))[0] for item in items]
    assert reds == [0, 1, 2, 3] * 3
    by_category = TASK.read(tmp_path / "Full")
    assert [(i.id, i.truth) for i in by_category] == [(i.id, i.truth) for i in items]


def test_hub_files_that_do_not_name_their_pictures_tell_them_by_their_bytes(tmp_path: Path) -> None:
    rows = [
        {**row, "image": files.hub_image((n // 2 % 2, 0, 0))} for n, row in enumerate(hub_rows())
    ]
    for row in rows:
        del row["image_source"]
    files.parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    items = TASK.read(tmp_path)
    first = items[0].picture_of
    assert [item.picture_of == first for item in items] == [True, True, False, False] * 3
    assert {item.truth["image"] for item in items} == {""}  # no name that an answer file could have
    files.parquet(tmp_path / "test-00000-of-00001.parquet", hub_rows())
    assert {item.picture_of for item in TASK.read(tmp_path)} == {"COCO_val2014_000000000007.jpg"}


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no label files coco_pope_"):
        TASK.read(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        TASK.read(tmp_path / "absent")
    path = files.pope_labels(tmp_path) / "coco_pope_popular.json"
    whole = path.read_text()
    path.write_text(whole + '{"question_id": 5')
    with pytest.raises(DataError, match=r"popular.json, line 5: not JSON"):
        TASK.read(tmp_path)
    path.write_text(whole.replace('"label": "no"', '"label": "maybe"'))
    with pytest.raises(DataError, match="line 3: label is 'maybe'"):
        TASK.read(tmp_path)
    path.write_text(whole + whole)
    with pytest.raises(DataError, match="question id 1 comes twice"):
        TASK.read(tmp_path)


def totals(**cells: int) -> dict[str, float]:
    return {name: float(value) for name, value in cells.items()}


def test_llavas_published_counts() -> None:
    """Random, LLaVA-1.5-7B: TP 1183, FP 31, TN 1379, FN 317 (issue 626 of haotian-liu/LLaVA)."""
    metrics = TASK.metrics(totals(tp_random=1183, fp_random=31, tn_random=1379, fn_random=317))
    assert metrics["f1_random"] == pytest.approx(0.8717759764185703, abs=1e-15)
    assert metrics["accuracy_random"] == pytest.approx(0.8804123711340206, abs=1e-15)
    assert metrics["precision_random"] == pytest.approx(0.9744645799011532, abs=1e-15)
    assert metrics["recall_random"] == pytest.approx(0.7886666666666666, abs=1e-15)
    assert metrics["yes_ratio_random"] == pytest.approx((1183 + 31) / 2910)
    assert metrics["f1"] == metrics["f1_random"], "the mean is over the categories that are there"


def test_the_headline_is_the_mean_of_three() -> None:
    cells = {}
    for category, (tp, fp, tn, fn) in zip(
        CATEGORIES, [(8, 1, 9, 2), (5, 5, 5, 5), (0, 0, 7, 3)], strict=True
    ):
        cells |= {f"tp_{category}": tp, f"fp_{category}": fp, f"tn_{category}": tn}
        cells[f"fn_{category}"] = fn
    metrics = TASK.metrics(totals(**cells))
    assert metrics["f1_adversarial"] == metrics["precision_adversarial"] == 0.0, "0/0 is 0"
    assert metrics["f1"] == pytest.approx((16 / 19 + 0.5 + 0.0) / 3)
    assert metrics["accuracy"] == pytest.approx((17 / 20 + 0.5 + 0.7) / 3)
    assert metrics["yes_ratio"] == pytest.approx((9 / 20 + 0.5 + 0.0) / 3)


def test_no_answers_at_all() -> None:
    assert set(TASK.metrics({}).values()) == {0.0}


@given(st.lists(st.tuples(st.sampled_from(CATEGORIES), st.booleans(), st.booleans()), max_size=60))
def test_summed_counts_give_the_official_figures(answers: list[tuple[str, bool, bool]]) -> None:
    from vllm_flow.eval.tasks.base import Item

    scored = [
        TASK.score(
            Item(str(n), "", None, {"label": "yes" if label else "no"}, category),
            "Yes" if said else "No",
        )
        for n, (category, label, said) in enumerate(answers)
    ]
    metrics = TASK.metrics(sum_counts(scored))
    for category in CATEGORIES:
        own = [(label, said) for c, label, said in answers if c == category]
        tp = own.count((True, True))
        positive, real = sum(s for _, s in own), sum(y for y, _ in own)
        precision = tp / positive if positive else 0.0
        recall = tp / real if real else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert metrics[f"f1_{category}"] == f1
        right = sum(label == said for label, said in own)
        assert metrics[f"accuracy_{category}"] == (right / len(own) if own else 0.0)
    assert sum(one.score for one in scored) == sum(y == s for _, y, s in answers)


@given(st.integers(1, 5), st.data())
def test_metrics_take_arrays(samples: int, data: st.DataObject) -> None:
    """A bootstrap's samples at once are the samples one by one."""
    names = [f"{cell}_{category}" for cell in ("tp", "fp", "tn", "fn") for category in CATEGORIES]
    column = st.lists(st.integers(0, 3), min_size=samples, max_size=samples)
    table = {name: np.array(data.draw(column), dtype=float) for name in names}
    together = TASK.metrics(table)
    for i in range(samples):
        alone = TASK.metrics({name: values[i] for name, values in table.items()})
        assert {name: values[i] for name, values in together.items()} == pytest.approx(alone)
