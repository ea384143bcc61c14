"""What every task promises, how tasks are found, and how images are opened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import UnidentifiedImageError

from tests.eval import files
from vllm_flow.eval import tasks
from vllm_flow.eval.tasks import Item, get_task, load_image, task_names
from vllm_flow.eval.tasks.base import parquet_image, ratio, sum_counts
from vllm_flow.eval.tasks.reading import DataError, parquet_rows, read_json, read_json_lines

EXAMPLES = {
    "pope": Item("random/1", "Q", None, {"label": "no"}, "random"),
    "scienceqa": Item("1", "Q", None, {"answer": "A", "has_image": True}),
    "textvqa": Item("1", "Q", None, {"answers": ["no"] * 10}),
    "chair": Item("1", "Q", None, {"objects": ["dog"]}),
    "mmstar": Item("1", "Q", None, {"answer": "A"}, "math"),
}


def test_names() -> None:
    assert task_names() == [
        "chair", "chair-opera", "mmstar", "pope", "scienceqa", "scienceqa-full", "textvqa",
        "textvqa-no-ocr",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no task 'vqa'; there are: chair, "):
        get_task("vqa")


@pytest.mark.parametrize("name", sorted(set(task_names()) - {"chair-opera"}))
def test_every_task_keeps_the_interface(name: str) -> None:
    task = get_task(name)
    example = EXAMPLES[name.split("-")[0]]
    assert task.name == name
    assert task.image_preparation == ("plain" if name.startswith("chair") else "pad")
    scored = [task.score(example, text) for text in ("No", "A", "A dog. A cat.", "")]
    for one in scored:
        assert one.id == example.id and one.group == example.group
        assert 0.0 <= one.score <= 1.0
        assert not task.binary or one.score in (0.0, 1.0)
        json.dumps(one.parsed)
    totals = sum_counts(scored)
    metrics = task.metrics(totals)
    assert task.headline in metrics
    assert all(isinstance(value, float) for value in metrics.values())
    assert set(task.metrics({}).values()) == {0.0}, "0/0 is 0"
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
    from PIL import Image

    Image.new("LA", (2, 2), (9, 255)).save(tmp_path / "x.png")
    assert load_image(str(tmp_path / "x.png")).mode == "RGB"


def test_images_that_are_not_there(tmp_path: Path) -> None:
    path = files.parquet(tmp_path / "x.parquet", [{"image": None, "n": b"text"}])
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        load_image(str(tmp_path / "absent.jpg"))
    with pytest.raises(FileNotFoundError, match="absent.parquet"):
        load_image(parquet_image(tmp_path / "absent.parquet", 0))
    with pytest.raises(FileNotFoundError, match="row 0 has no image"):
        load_image(parquet_image(path, 0))
    with pytest.raises(IndexError, match="1 rows, so no row 1"):
        load_image(parquet_image(path, 1))
    with pytest.raises(KeyError, match="no column 'picture'"):
        load_image(parquet_image(path, 0, "picture"))
    with pytest.raises(UnidentifiedImageError):
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
        files.json_lines(tmp_path / "x.jsonl", [{"a": True, "b": None, "c": "7"}])
    )[0]
    with pytest.raises(DataError, match=r"line 1: no 'd' \(the record has a, b, c\)"):
        row.get("d")
    with pytest.raises(DataError, match="line 1: 'a' is True, not a whole number"):
        row.get("a", int)
    with pytest.raises(DataError, match="line 1: 'b' is None, not text"):
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
