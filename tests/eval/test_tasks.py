"""What every task promises, how tasks are found, and how images are opened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.eval import files
from vllm_flow.eval import tasks
from vllm_flow.eval.tasks import Item, get_task, load_image, task_names
from vllm_flow.eval.tasks.base import (
    Metrics,
    Scored,
    Task,
    Totals,
    counts_of,
    mean_metrics,
    measured,
    ratio,
    sum_counts,
)
from vllm_flow.eval.tasks.parquet import parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.reading import DataError, read_json, read_json_lines
from vllm_flow.pictures import PictureError

EXAMPLES = {
    "pope": Item("random/1", "Q", None, {"label": "no"}, "random"),
    "scienceqa": Item("1", "Q", None, {"answer": "A", "has_image": True}),
    "textvqa": Item("1", "Q", None, {"answers": ["no"] * 10}),
    "chair": Item("1", "Q", None, {"objects": ["dog"]}),
    "mmstar": Item("1", "Q", None, {"answer": "A"}, "math"),
    "ai2d": Item("1", "Q", None, {"answer": "A"}),
    "amber": Item("1", "Q", None, {
        "truth": ["dog"], "hallu": ["cat"], "associates": {"dog": [], "cat": []}, "vocabulary": ["cat", "dog"],
        "safe": [],
    }),
    "chartqa": Item("1", "Q", None, {"answer": "no"}, "human"),
    "docvqa": Item("1", "Q", None, {"answers": ["no"]}),
    "gqa": Item("1", "Q", None, {"answer": "no"}, "open"),
    "infovqa": Item("1", "Q", None, {"answers": ["no"]}),
    "mmbench": Item("1", "Q", None, {
        "answer": "A", "options": {"A": "x", "B": "y"}, "question_id": "1", "rotations": 1,
    }, "logic_reasoning"),
    "mme": Item("1", "Q", None, {"label": "no", "image_id": "1"}, "OCR"),
    "ocrbench": Item("1", "Q", None, {"answers": ["no"], "dataset": "svt"}, "recognition"),
    "realworldqa": Item("1", "Q", None, {"answer": "A"}),
    "refcoco": Item("1", "Q", None, {"box": [0, 0, 1, 1], "size": [1, 1]}, "val"),
    "vizwiz": Item("1", "Q", None, {"answers": ["no"] * 10}, "other"),
}  # fmt: skip


def test_names() -> None:
    assert task_names() == [
        "ai2d", "amber", "amber-words", "chair", "chair-opera", "chartqa", "docvqa", "gqa", "infovqa", "mmbench",
        "mme", "mmstar", "ocrbench", "pope", "pope-aokvqa", "pope-coco", "pope-gqa", "realworldqa", "refcoco",
        "refcoco-internvl", "refcoco-qwen", "refcoco-qwen3", "scienceqa", "scienceqa-full", "textvqa",
        "textvqa-no-ocr", "vizwiz",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no task 'vqa'; there are: ai2d, "):
        get_task("vqa")


NEED_MORE = {"chair-opera", "amber", "amber-words"}
"""Tasks that need a tagger, WordNet or word vectors, which a machine may lack; their own tests stand in."""


@pytest.mark.parametrize("name", sorted(set(task_names()) - NEED_MORE))
def test_every_task_keeps_the_interface(name: str) -> None:
    task = get_task(name)
    example = EXAMPLES[name.split("-")[0]]
    assert task.name == name
    plain = name.startswith(("chair", "amber", "refcoco-"))
    own = "pad" if name == "refcoco" else "conversation"
    assert task.image_preparation == ("plain" if plain else own)
    scored = [task.score(example, text) for text in ("No", "A", "A dog. A cat.", "")]
    for one in scored:
        assert one.id == example.id and one.group == example.group
        assert 0.0 <= one.score <= 1.0
        assert not task.binary or one.score in (0.0, 1.0)
        json.dumps(one.parsed)
    totals = sum_counts(task.together(scored))
    metrics = task.metrics(totals)
    assert task.headline in metrics and task.full_marks.keys() <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())
    assert set(task.metrics({}).values()) == {0.0}, "0/0 is 0"
    shown = measured(task, metrics, scored)
    assert task.parts.keys() <= metrics.keys() and task.headline in shown
    assert all(example.group not in task.parts[metric] for metric in metrics.keys() - set(shown))
    assert all(metrics[metric] == 0.0 for metric in metrics.keys() - set(shown))
    assert not task.parts or example.group in {g for of in task.parts.values() for g in of}
    many = task.metrics({key: np.array([value, 0.0, 2 * value]) for key, value in totals.items()})
    for metric, value in metrics.items():
        assert many[metric] == pytest.approx([value, 0.0, value])


@pytest.mark.parametrize(
    ("name", "max_tokens", "headline"),
    [("pope", 128, "f1"), ("scienceqa", 1024, "img_accuracy"), ("textvqa", 128, "accuracy"),
     ("chair", 512, "chair_i")],
)  # fmt: skip
def test_protocol(name: str, max_tokens: int, headline: str) -> None:
    task = get_task(name)
    assert (task.max_tokens, task.headline) == (max_tokens, headline)
    assert task.higher_is_better == (name != "chair")
    assert task.binary == (name in ("pope", "scienceqa"))


@pytest.mark.parametrize(
    ("truth", "same"),
    [
        ({"image_id": "p"}, True), ({"image": "p.jpg"}, True), ({"image_id": 7}, True), ({}, False),
        ({"image": ""}, False), ({"image_id": None}, False),
    ],
)  # fmt: skip
def test_questions_about_one_picture_know_it(truth: dict, same: bool) -> None:
    """Also where a hub file embeds the picture in every row."""
    one, two = (Item(str(n), "Q", parquet_image(Path("x"), n), truth) for n in (1, 2))
    assert (one.picture_of == two.picture_of) == same
    alone, other = (Item(str(n), "Q", None, truth) for n in (1, 2))
    assert alone.picture_of != other.picture_of, "without a picture an item stands for itself"


def test_a_metric_that_equals_every_score_need_not_be_their_mean() -> None:
    """CHAIR_i of single captions is 1 less the score; of all of them, long captions weigh more."""
    task = replace_metrics({"of_mentions": ("right", "said"), "of_captions": ("share", "captions")})
    scored = [
        Scored("1", None, 1.0, {"right": 1.0, "said": 1.0, "share": 1.0, "captions": 1.0}),
        Scored("2", None, 0.5, {"right": 2.0, "said": 4.0, "share": 0.5, "captions": 1.0}),
    ]
    assert mean_metrics(task, scored) == {"of_captions"}
    assert mean_metrics(task, []) == set()


def replace_metrics(parts: dict[str, tuple[str, str]]) -> Task:
    """A task that counts so."""

    class Counting(type(get_task("pope"))):  # type: ignore[misc]
        def metrics(self, totals: Totals) -> Metrics:
            return {name: ratio(*counts_of(totals, *both)) for name, both in parts.items()}

    return Counting()


NEW_TASK = """
from dataclasses import dataclass
from vllm_flow.eval.tasks.base import Item, Scored, Task, ratio

@dataclass(frozen=True)
class Fifth(Task):
    name = "fifth"
    max_tokens = 8
    headline = "accuracy"
    def read(self, data): return [Item("1", "Q", None, {})]
    def score(self, item, text): return Scored(item.id, text, 1.0, {"n": 1.0})
    def metrics(self, totals): return {"accuracy": ratio(totals.get("n", 0.0), 1.0)}

TASK = Fifth()
"""


def test_a_new_task_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fifth.py").write_text(NEW_TASK)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    tasks._tasks.cache_clear()
    try:
        assert get_task("fifth").read(tmp_path)[0].text == "Q"
        (tmp_path / "sixth.py").write_text("VALUE = 1\n")
        tasks._tasks.cache_clear()
        with pytest.raises(TypeError, match="sixth must hold TASK"):
            task_names()
    finally:
        tasks._tasks.cache_clear()


def test_ratio() -> None:
    assert ratio(1, 4) == 0.25 and isinstance(ratio(1, 4), float)
    assert ratio(3, 0) == 0.0
    assert ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])) == pytest.approx([0.0, 0.5])
    assert ratio(np.array([1.0, 2.0]), 2) == pytest.approx([0.5, 1.0])


def test_embedded_images(tmp_path: Path) -> None:
    """Row groups, the hub's structs, bare bytes and paths."""
    rows = [
        {"n": n, "image": files.hub_image((n, 0, 0)), "b": files.png((0, n, 0))} for n in range(5)
    ]
    path = files.parquet(tmp_path / "x.parquet", rows)
    for n in (4, 0, 3, 1, 2):
        assert load_image(parquet_image(path, n)).getpixel((0, 0)) == (n, 0, 0)
        assert load_image(parquet_image(path, n, "b")).getpixel((0, 0)) == (0, n, 0)
    files.image_file(tmp_path / "p/y.png", (7, 7, 7))
    pathed = files.parquet(tmp_path / "y.parquet", [{"image": {"bytes": None, "path": "p/y.png"}}])
    assert load_image(parquet_image(pathed, 0)).getpixel((0, 0)) == (7, 7, 7)
    files.parquet(path, [rows[3]])
    assert load_image(parquet_image(path, 0)).getpixel((0, 0)) == (3, 0, 0), (
        "the file was rewritten"
    )


def test_images_become_rgb(tmp_path: Path) -> None:
    Image.new("LA", (2, 2), (9, 255)).save(tmp_path / "x.png")
    assert load_image(str(tmp_path / "x.png")).mode == "RGB"


@pytest.mark.parametrize("name", ["a#row=3&column=image.jpg", "x.parquet#row=0&column=image"])
def test_a_file_may_be_called_like_a_cell(tmp_path: Path, name: str) -> None:
    path = files.image_file(tmp_path / name, (7, 0, 0))
    files.parquet(tmp_path / "x.parquet", [{"image": files.hub_image((9, 0, 0))}])
    assert load_image(str(path)).getpixel((0, 0)) == (7, 0, 0)
    inside = files.parquet(tmp_path / f"{name}.parquet", [{"image": files.hub_image((5, 0, 0))}])
    assert load_image(parquet_image(inside, 0)).getpixel((0, 0)) == (5, 0, 0)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1), st.integers(0, 9))
def test_no_path_is_a_cell(name: str, row: int) -> None:
    cell = parquet_image(Path(name), row)
    assert str(Path(cell)) != cell, "Items name files by str(Path)"
    with pytest.raises(PictureError):
        load_image(str(Path("/nowhere") / cell))


def test_a_transparent_picture_in_both_readings(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGBA", (2, 2), (200, 10, 10, 0)).save(path)
    assert load_image(str(path)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(str(path), background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    assert load_image(str(path), "stored").getpixel((0, 0)) == (200, 10, 10)


def test_images_that_are_not_there(tmp_path: Path) -> None:
    path = files.parquet(tmp_path / "x.parquet", [{"image": None, "n": b"text"}])
    with pytest.raises(PictureError, match="absent.jpg: there is no such file"):
        load_image(str(tmp_path / "absent.jpg"))
    with pytest.raises(PictureError, match="absent.parquet: there is no such file"):
        load_image(parquet_image(tmp_path / "absent.parquet", 0))
    with pytest.raises(PictureError, match="row 0, column 'image': no picture there"):
        load_image(parquet_image(path, 0))
    with pytest.raises(PictureError, match="1 row, so no row 1"):
        load_image(parquet_image(path, 1))
    with pytest.raises(PictureError, match="no column 'picture'"):
        load_image(parquet_image(path, 0, "picture"))
    with pytest.raises(PictureError, match="column 'n': no picture of a kind"):
        load_image(parquet_image(path, 0, "n"))


def test_files_that_are_not_as_they_must_be(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read_json_lines(path)
    path.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(DataError, match="line 3: expected an object like {...}, found a list"):
        read_json_lines(path)
    path.write_text('\ufeff{"a": "\u2028"}\r\n{"b": tru}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_json_lines(path)
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8 text .* at byte 7"):
        read_json_lines(path)
    with pytest.raises(DataError, match="is a directory"):
        read_json(tmp_path)
    path.write_text("[1,\n2")
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="the file holds a list, not an object"):
        read_json(path, dict)
    with pytest.raises(DataError, match="not a parquet file"):
        parquet_rows(path, ["a"])
    with pytest.raises(DataError, match=r"no column b \(the file has a\)"):
        parquet_rows(files.parquet(tmp_path / "x.parquet", [{"a": 1}]), ["a", "b"])


def test_a_missing_or_strange_value_is_named(tmp_path: Path) -> None:
    row = read_json_lines(
        files.json_lines(tmp_path / "x.jsonl", [{"a": True, "b": None, "c": "7", "d²": "4²"}])
    )[0]
    assert row.number("c", "a number") == 7
    with pytest.raises(DataError, match="line 1: 'd²' is '4²', not a COCO image id"):
        row.number("d²", "a COCO image id")
    with pytest.raises(DataError, match=r"line 1: no 'd' \(the record has a, b, c, d²\)"):
        row.get("d")
    with pytest.raises(DataError, match="line 1: 'a' is true, not a whole number"):
        row.get("a", int)
    with pytest.raises(DataError, match="line 1: 'b' is null, not text"):
        row.get("b", str)
    assert row.identifier("c") == "7"


def test_tasks_need_neither_engine_nor_cluster() -> None:
    code = (
        "import sys; from vllm_flow.eval import tasks; "
        "from vllm_flow.eval.scoring import command, answer_files, pope_answers; "
        "tasks.task_names(); print(sorted({'torch', 'vllm', 'ray', 'nltk', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
