"""Held-out pictures in four benchmarks' formats: read by the evaluation's tasks, and true to the scenes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.demo.sprites import drawn_palette
from vllm_flow.demo import coco
from vllm_flow.demo.datasets import TASKS, main, write_datasets
from vllm_flow.demo.heldout import SPLITS, HeldoutPicture, read_pictures, write_pictures
from vllm_flow.demo.questions import caption, how_many, presence
from vllm_flow.demo.training.sprites import Assets
from vllm_flow.eval.tasks import get_task, load_image

COUNT = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    every = dict(drawn_palette().sprites)
    few = drawn_palette(("dog", "zebra", "car", "guitar")).sprites
    assets = Assets(every, every, every, every, {**dict.fromkeys(every, []), **few})
    write_pictures(assets, out, COUNT)
    return out


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("datasets")
    assert main(["--pictures", str(pictures), "--out", str(out)]) == 0
    return out


def of(pictures: Path, split: str) -> list[HeldoutPicture]:
    return read_pictures(pictures, split)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_pictures_are_read_back(pictures: Path) -> None:
    every = read_pictures(pictures)
    assert Counter(picture.split for picture in every) == dict.fromkeys(SPLITS, COUNT)
    assert all(picture.image_path.is_file() for picture in every)
    photos = {name for picture in of(pictures, "unseen_photos") for name in picture.objects}
    assert photos == {"dog", "zebra", "car", "guitar"}
    with pytest.raises(ValueError, match="use one of seen"):
        read_pictures(pictures, "heard")
    with pytest.raises(FileNotFoundError, match=r"grown\.heldout"):
        read_pictures(pictures / "nowhere")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "task", ["pope", "scienceqa", "textvqa", "chair", "textvqa-no-ocr", "scienceqa-full"]
)
def test_the_evaluation_reads_every_task(task: str, split: str, data: Path) -> None:
    items = get_task(task).read(data / split / task.split("-")[0])
    assert len(items) >= COUNT * 0.5
    assert len({item.id for item in items}) == len(items)
    assert all(load_image(item.image).size == (168, 168) for item in items[:3] if item.image)


@pytest.mark.parametrize("split", SPLITS)
def test_pope_labels_are_true(split: str, data: Path, pictures: Path) -> None:
    scenes = of(pictures, split)
    shown = {name for picture in scenes for name in picture.objects}
    ids = {picture.image_path.stem: picture for picture in scenes}
    for item in get_task("pope").read(data / split / "pope"):
        number = int(Path(item.image).stem.split("_")[-1])
        first = {"unseen_style": 1001, "unseen_photos": 2001, "unseen_backgrounds": 3001}
        picture = ids[f"{number - first.get(split, 1):04d}"]
        question = item.text.split("\n")[0]
        there = {presence(name) for name in picture.objects}
        assert (question in there) == (item.truth["label"] == "yes")
        assert question in {presence(name) for name in shown}


def test_pope_is_balanced_in_every_category(data: Path) -> None:
    items = get_task("pope").read(data / "seen" / "pope")
    said = Counter((item.group, item.truth["label"]) for item in items)
    assert len(said) == 6 and len(set(said.values())) == 1


def test_right_answers_score_full_marks(data: Path, pictures: Path) -> None:
    """What the model is taught to say is what the official rules count as right."""
    folder = data / "seen"
    words = {int(p.image_path.stem): s.word for p in of(pictures, "seen") for s in p.facts.signs}
    for name, answer in (
        ("pope", lambda item: item.truth["label"].capitalize()),
        ("scienceqa", lambda item: item.truth["answer"]),
        ("textvqa", lambda item: words[int(Path(item.image).stem, 16) - 1]),
    ):
        task = get_task(name)
        scores = [task.score(item, answer(item)).score for item in task.read(folder / name)]
        assert sum(scores) / len(scores) == 1.0, name
    task = get_task("chair")
    captions = {p.image_path.stem: caption(p.facts) for p in of(pictures, "seen")}
    totals: Counter[str] = Counter()
    for item in task.read(folder / "chair"):
        stem = f"{int(Path(item.image).stem.split('_')[-1]) - 1:04d}"
        totals.update(task.score(item, captions[stem]).counts)
    metrics = task.metrics(totals)
    assert metrics["chair_i"] == 0.0 and metrics["recall"] > 0.95


@pytest.mark.parametrize("split", SPLITS)
def test_places_and_numbers_are_true(split: str, data: Path, pictures: Path) -> None:
    first = {"unseen_style": 1001, "unseen_photos": 2001, "unseen_backgrounds": 3001}.get(split, 1)
    facts = {int(p.image_path.stem) + first: p.facts for p in of(pictures, split)}
    items = get_task("pope").read(data / split / "places")
    assert Counter(item.truth["label"] for item in items)["yes"] * 2 == len(items) > 0
    for item in items:
        scene = facts[int(Path(item.image).stem.split("_")[-1])]
        one, other = item.text.split("?")[0].removeprefix("Is the ").split(" to the left of the ")
        assert ((one, other) in scene.beside()) == (item.truth["label"] == "yes")
    items = get_task("textvqa-no-ocr").read(data / split / "counting")
    assert len(items) > 5
    for item in items:
        counts = facts[int(Path(item.image).stem, 16)].counts
        name = next(n for n in counts if item.text.startswith(how_many(n)))
        assert set(item.truth["answers"]) == {str(counts[name])}


def test_instances_have_the_things_boxes(data: Path, pictures: Path) -> None:
    content = read(data / "seen" / "chair" / "instances_val2014.json")
    names = {row["id"]: row["name"] for row in content["categories"]}
    found: dict[int, list[tuple[str, list[int]]]] = {}
    for row in content["annotations"]:
        found.setdefault(row["image_id"], []).append((names[row["category_id"]], row["bbox"]))
    for picture in of(pictures, "seen"):
        wanted = [
            (coco.category(thing.name), [thing.box[0], thing.box[1], thing.box[2] - thing.box[0],
                                         thing.box[3] - thing.box[1]])
            for thing in picture.facts.things
            if coco.category(thing.name) is not None
        ]  # fmt: skip
        assert found.get(int(picture.image_path.stem) + 1, []) == wanted


def test_items_limit_and_seed(pictures: Path, tmp_path: Path) -> None:
    counts = write_datasets(pictures, tmp_path / "a", "seen", items=8, seed=1)
    assert counts == {
        "pope": 24, "scienceqa": 8, "textvqa": 8, "chair": 8, "places": 8, "counting": 8,
    }  # fmt: skip
    assert set(counts) == set(TASKS)
    write_datasets(pictures, tmp_path / "b", "seen", items=8, seed=1)
    write_datasets(pictures, tmp_path / "c", "seen", items=8, seed=2)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json")]
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    assert any(
        (tmp_path / "a" / f).read_bytes() != (tmp_path / "c" / f).read_bytes() for f in files
    )
    with pytest.raises(ValueError, match="at least 1"):
        write_datasets(pictures, tmp_path, "seen", items=0)
    with pytest.raises(ValueError, match="unknown split"):
        write_datasets(pictures, tmp_path, "heard")
