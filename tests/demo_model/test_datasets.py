"""Held-out scenes in benchmarks' file formats: complete, deterministic, true to the scenes, and read by
the evaluation's tasks, which give full marks to what the model is taught to say."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.demo_model.dataset_files import by_id, read, scene_of, tree
from tests.demo_model.sprites import PHOTOGRAPHED, drawn_assets
from vllm_flow.demo_model import coco_ids
from vllm_flow.demo_model.datasets import BENCHMARKS, TASKS, write_datasets
from vllm_flow.demo_model.datasets.__main__ import main
from vllm_flow.demo_model.datasets.common import image_id
from vllm_flow.demo_model.heldout import SPLITS, HeldoutScene, load_scenes
from vllm_flow.demo_model.questions import caption
from vllm_flow.demo_model.scenes import SIZE
from vllm_flow.demo_model.training.heldout_data import COUNTS, split_count, write_scenes
from vllm_flow.eval.tasks import get_task, load_image
from vllm_flow.eval.tasks.base import Item
from vllm_flow.exits import guarded

COUNT = 30
"""Scenes of a split."""
ITEMS = 12
READ_BY = {
    "pope": ("pope",),
    "scienceqa": ("scienceqa", "scienceqa-full"),
    "textvqa": ("textvqa", "textvqa-no-ocr"),
    "chair": ("chair",),
    "places": ("pope",),
    "counting": ("textvqa-no-ocr",),
}
"""Folder -> the evaluation's tasks that read it."""
EACH_FOLDER = [(folder, task) for folder, tasks in READ_BY.items() for task in tasks]


def test_scenes_are_read_back(pictures: Path) -> None:
    every = load_scenes(folder=pictures)
    assert Counter(scene.split for scene in every) == dict.fromkeys(SPLITS, COUNT)
    assert all(scene.image_path.is_file() for scene in every)
    photos = {name for scene in load_scenes("unseen_photos", pictures) for name in scene.objects}
    assert photos == set(PHOTOGRAPHED)
    assert len({scene.facts for scene in every}) > 0.95 * len(every)  # each split has its own seeds


def test_a_splits_scenes_do_not_depend_on_the_others(pictures: Path, tmp_path: Path) -> None:
    write_scenes(drawn_assets(), tmp_path, {"unseen_style": 3})
    found = load_scenes(folder=tmp_path)
    assert [s.facts for s in found] == [s.facts for s in load_scenes("unseen_style", pictures)[:3]]
    assert tree(tmp_path / "unseen_style").items() <= tree(pictures / "unseen_style").items()


def test_the_seed_decides_every_byte(pictures: Path, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> dict[str, bytes]:
        write_datasets(tmp_path / name, ITEMS, seed, "seen", list(TASKS), pictures)
        return tree(tmp_path / name)

    one, again, other = written("one", 3), written("again", 3), written("other", 4)
    assert one == again
    for task in TASKS:
        mine = {path: content for path, content in one.items() if path.startswith(f"{task}/")}
        assert mine and any(other.get(path) != content for path, content in mine.items()), task


def test_a_task_does_not_depend_on_the_others(data: Path, pictures: Path, tmp_path: Path) -> None:
    for task in TASKS:
        write_datasets(tmp_path / task, None, 3, "seen", [task], pictures)
        assert tree(tmp_path / task / task) == tree(data / "seen" / task)
        folders = {path.name for path in (tmp_path / task).iterdir() if path.is_dir()}
        assert folders == {task}


def test_at_most_so_many_items(pictures: Path, tmp_path: Path) -> None:
    counts = write_datasets(tmp_path, 8, 1, "seen", list(TASKS), pictures)
    assert counts == {
        "pope": 24, "scienceqa": 8, "textvqa": 8, "chair": 8, "places": 8, "counting": 8,
    }  # fmt: skip
    few = write_datasets(tmp_path / "few", 1, 1, "seen", ["pope"], pictures)
    assert few == {"pope": 6}  # a question with yes and one with no in each file


@pytest.mark.parametrize("split", SPLITS)
def test_everything_is_used_without_a_limit(split: str, data: Path, pictures: Path) -> None:
    scenes = load_scenes(split, pictures)
    counts = read(data / split / "about.json")["items"]
    shown = {name for scene in scenes for name in scene.objects}
    pairs = sum(min(3, len(scene.objects), len(shown - set(scene.objects))) for scene in scenes)
    assert counts["pope"] == 3 * 2 * pairs
    assert counts["scienceqa"] == 2 * len(scenes)
    assert counts["textvqa"] == 2 * sum(len(scene.facts.signs) == 1 for scene in scenes)
    assert counts["chair"] == sum(any(map(coco_ids.category, scene.objects)) for scene in scenes)
    assert counts["places"] == 2 * sum(bool(scene.facts.beside()) for scene in scenes)
    assert 0 < counts["counting"] <= len(scenes)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("folder, task", EACH_FOLDER)
def test_the_evaluation_reads_every_task(folder: str, task: str, split: str, data: Path) -> None:
    items = get_task(task).read(data / split / folder)
    count = read(data / split / "about.json")["items"][folder]
    without = count // 5 if task == "scienceqa-full" else 0  # problems without a picture
    assert len(items) == count + without
    assert len({item.id for item in items}) == len(items)
    assert sum(item.image is None for item in items) == without
    for item in items[:5]:
        if item.image is not None:
            picture = load_image(item.image)
            assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))


def right_answer(folder: str, item: Item, scene: HeldoutScene | None) -> str:
    """What the model is taught to say."""
    if folder in ("pope", "places"):
        return item.truth["label"].capitalize()
    if folder == "scienceqa":
        return item.truth["answer"]
    assert scene is not None
    if folder == "textvqa":
        return scene.facts.signs[0].word
    if folder == "chair":
        return caption(scene.facts)
    return max(item.truth["answers"], key=item.truth["answers"].count)


@pytest.mark.parametrize("folder, task", EACH_FOLDER)
def test_right_answers_score_full_marks(folder: str, task: str, data: Path, pictures: Path) -> None:
    scorer, scenes = get_task(task), by_id(pictures, "seen")
    totals: Counter[str] = Counter()
    for item in scorer.read(data / "seen" / folder):
        scene = None if folder == "scienceqa" else scene_of(item, scenes)
        scored = scorer.score(item, right_answer(folder, item, scene))
        totals.update(scored.counts)
        if folder == "chair":
            assert scored.parsed["hallucinated"] == []
        else:
            assert scored.score == 1.0, item
    metrics = scorer.metrics(totals)
    if folder == "chair":  # the official rule reads neither "bus" nor "ties"
        assert metrics["chair_i"] == 0.0 and metrics["recall"] > 0.95
    else:
        assert metrics[scorer.headline] == 1.0


def test_no_two_splits_share_a_pictures_id() -> None:
    scenes = [HeldoutScene(Path(f"{COUNTS[s] - 1:04d}.webp"), None, s) for s in SPLITS]  # type: ignore[arg-type]
    firsts = [HeldoutScene(Path("0000.webp"), None, s) for s in SPLITS]  # type: ignore[arg-type]
    ends = [image_id(scene) for scene in scenes]
    assert all(end < image_id(first) for end, first in zip(ends, firsts[1:], strict=False))
    assert image_id(firsts[0]) == 1  # COCO's ids count from 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_readme_denies_being_the_benchmarks(split: str, data: Path) -> None:
    text = (data / split / "README.md").read_text()
    assert "**These are not the benchmarks.**" in text and f"split `{split}`" in text
    assert all(f"| `{name}/` | {count} |" in text for name, count in read(
        data / split / "about.json")["items"].items())  # fmt: skip
    assert "not benchmark scores" in read(data / split / "about.json")["note"]
    licence = {"seen": "Noto", "unseen_style": "CC-BY-SA-4.0"}.get(split, "GPL-2")
    assert licence in text


def test_the_command_writes_the_shipped_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--limit", "4"]) == 0
    printed = capsys.readouterr().out
    counts = {"pope": 12, "scienceqa": 4, "textvqa": 4, "chair": 4}
    assert set(counts) == set(BENCHMARKS)
    for name, count in counts.items():
        assert f"{name}: {count} items" in printed
        assert len(get_task(name).read(tmp_path / name)) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["vqa"]}, "unknown task 'vqa': use some of pope, scienceqa"),
        ({"split": "photo"}, "unknown split 'photo': use one of seen"),
        ({"split": "unseen_photos"}, "no scenes of the split 'unseen_photos' .*seen, unseen_style"),
        ({"items": 0}, "at least 1, got 0"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_datasets(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "'0' is no whole number above 0"),
        (["--split", "unseen_backgrounds"], "heldout_data makes them"),
        (["--pictures", "nowhere"], "no such file; make scenes with"),
        (["--tasks", "vqa"], "invalid choice: 'vqa'"),
    ],
)
def test_the_command_refuses_in_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = guarded("datasets", lambda: main(["--out", str(tmp_path / "out"), *more]))
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("split", SPLITS)
def test_counts_of_splits_are_read(split: str) -> None:
    assert split_count(f"{split}=40") == (split, 40)


@pytest.mark.parametrize(
    "text", ["seen", "seen=", "seen=0", "seen=-1", "seen=1.5", "photo=3", "=3"]
)
def test_other_counts_of_splits_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}': give SPLIT=NUMBER"):
        split_count(text)
