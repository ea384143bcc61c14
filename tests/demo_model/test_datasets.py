"""Held-out scenes in benchmarks' file formats: complete, deterministic, true to the scenes, and read by
the evaluation's tasks, which give full marks to what the model is taught to say."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.demo_model.sprites import PHOTOGRAPHED, drawn_assets
from tests.demo_model.truth import fitting
from vllm_flow.demo_model import coco_ids
from vllm_flow.demo_model.datasets import BENCHMARKS, TASKS, write_datasets
from vllm_flow.demo_model.datasets.__main__ import main
from vllm_flow.demo_model.datasets.common import coco_name, image_id
from vllm_flow.demo_model.datasets.pope import CATEGORIES
from vllm_flow.demo_model.datasets.readme import COCO
from vllm_flow.demo_model.heldout import SPLITS, HeldoutScene, load_scenes
from vllm_flow.demo_model.questions import caption, how_many, presence
from vllm_flow.demo_model.scenes import SIZE
from vllm_flow.demo_model.training.heldout_data import COUNTS, split_count, write_scenes
from vllm_flow.demo_model.vocabulary import CLASSES, KIND_OF, with_article
from vllm_flow.eval.tasks import get_task, load_image
from vllm_flow.eval.tasks.base import Item

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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    write_scenes(drawn_assets(), out, dict.fromkeys(SPLITS, COUNT))
    return out


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task of every split, with all the items there are."""
    out = tmp_path_factory.mktemp("datasets")
    for split in SPLITS:
        write_datasets(out / split, None, 3, split, list(TASKS), pictures)
    return out


def by_id(pictures: Path, split: str) -> dict[int, HeldoutScene]:
    return {image_id(scene): scene for scene in load_scenes(split, pictures)}


def scene_of(item: Item, scenes: dict[int, HeldoutScene]) -> HeldoutScene:
    """The scene that an item's picture shows; its name holds the id, decimal or hexadecimal."""
    stem = Path(str(item.image)).stem
    return scenes[int(stem.split("_")[-1]) if stem.startswith("COCO") else int(stem, 16)]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("split", SPLITS)
def test_pope_labels_are_true_and_balanced(
    split: str, category: str, data: Path, pictures: Path
) -> None:
    folder = data / split / "pope"
    scenes = {coco_name(image_id(scene)): scene for scene in load_scenes(split, pictures)}
    shown = {name for scene in scenes.values() for name in scene.objects}
    name_of = {presence(name): name for name in CLASSES}
    rows = lines(folder / f"coco_pope_{category}.json")
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    per_picture: dict[str, Counter[str]] = {}
    for row in rows:
        name = name_of[row["text"]]
        assert name in shown
        assert (name in scenes[row["image"]].objects) == (row["label"] == "yes")
        per_picture.setdefault(row["image"], Counter())[row["label"]] += 1
        assert (folder / "val2014" / row["image"]).is_file()
    assert all(1 <= said["yes"] == said["no"] <= 3 for said in per_picture.values())
    assert len({(row["image"], row["text"]) for row in rows}) == len(rows)


def test_pope_files_share_the_yes_questions_and_differ_in_no(data: Path, pictures: Path) -> None:
    by_label: dict[str, list[list[tuple[str, str]]]] = {"yes": [], "no": []}
    for category in CATEGORIES:
        rows = lines(data / "seen" / "pope" / f"coco_pope_{category}.json")
        for label, found in by_label.items():
            found.append([(row["image"], row["text"]) for row in rows if row["label"] == label])
    first, second, third = by_label["yes"]
    assert first == second == third
    evenly, popular, adversarial = by_label["no"]
    assert evenly != popular != adversarial != evenly
    assert len({text for _, text in popular}) < len({text for _, text in evenly})
    scenes = {coco_name(image_id(scene)): scene for scene in load_scenes("seen", pictures)}
    name_of = {presence(name): name for name in CLASSES}
    frequent = Counter(name for scene in scenes.values() for name in scene.objects)

    def together(image: str, name: str) -> int:
        here = set(scenes[image].objects)
        return sum(len(here & set(s.objects)) for s in scenes.values() if name in s.objects)

    def mean(rows: list[tuple[str, str]], value: Callable[[str, str], int]) -> float:
        return sum(value(image, name_of[text]) for image, text in rows) / len(rows)

    assert mean(popular, lambda _, name: frequent[name]) > 1.5 * mean(
        evenly, lambda _, name: frequent[name]
    )
    assert mean(adversarial, together) > 1.5 * max(mean(evenly, together), mean(popular, together))


@pytest.mark.parametrize("split", SPLITS)
def test_scienceqa_problems_have_one_right_answer(split: str, data: Path, pictures: Path) -> None:
    folder = data / split / "scienceqa"
    problems = read(folder / "problems.json")
    splits = read(folder / "pid_splits.json")
    assert splits["test"] == list(problems) and not any(
        pids for name, pids in splits.items() if name != "test"
    )

    def pixels(path: Path) -> bytes:
        with Image.open(path) as image:
            return image.convert("RGB").tobytes()

    scenes = {pixels(scene.image_path): scene for scene in load_scenes(split, pictures)}
    topics: Counter[str] = Counter()
    for pid, problem in problems.items():
        choices, right = problem["choices"], problem["answer"]
        assert 2 <= len(choices) == len(set(choices)) <= 4
        topics[problem["topic"]] += 1
        picture = folder / "images" / "test" / pid / "image.png"
        assert picture.exists() == (problem["image"] == "image.png")
        if problem["image"] is None:
            kind = problem["question"].removeprefix("Which of these is ").rstrip("?")
            fits = [with_article(KIND_OF[choice]) == kind for choice in choices]
        else:
            facts = scenes[pixels(picture)].facts
            fits = fitting(problem["question"], problem["topic"], choices, facts)
        assert fits == [number == right for number in range(len(choices))], problem
    assert {"objects", "numbers"} <= set(topics) and len(topics) >= 4
    assert {problem["hint"] == "" for problem in problems.values()} == {True, False}


@pytest.mark.parametrize("split", SPLITS)
def test_textvqa_joins_questions_answers_and_tokens(split: str, data: Path, pictures: Path) -> None:
    folder, scenes = data / split / "textvqa", by_id(pictures, split)
    questions = read(folder / "TextVQA_0.5.1_val.json")["data"]
    rows = read(folder / "TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    ocr = {row["image_id"]: row for row in rows}
    assert len({(q["image_id"], q["question"]) for q in questions}) == len(questions)
    assert len(ocr) == len(rows) == len(questions) / 2
    agreed = []
    for question in questions:
        word, count = Counter(question["answers"]).most_common(1)[0]
        facts = scenes[int(question["image_id"], 16)].facts
        assert [sign.word for sign in facts.signs] == [word]
        assert len(question["answers"]) == 10 and count >= 6
        tokens = ocr[question["image_id"]]["ocr_tokens"]
        assert tokens == [info["word"] for info in ocr[question["image_id"]]["ocr_info"]]
        agreed.append(word in tokens)
        with Image.open(folder / "train_images" / f"{question['image_id']}.jpg") as picture:
            assert picture.size == (question["image_width"], question["image_height"])
    assert 0.6 < sum(agreed) / len(agreed) < 1, "some words are misread or not found"


def test_textvqa_signs_are_where_the_tokens_say(data: Path) -> None:
    """Dark letters on a light plate or light ones on a dark plate, and little between."""
    folder = data / "seen" / "textvqa"
    rows = read(folder / "TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    clear = []
    for row in rows:
        for info in row["ocr_info"][:1]:
            box = info["bounding_box"]
            left, top = box["top_left_x"], box["top_left_y"]
            corners = (left, top, left + box["width"], top + box["height"])
            assert 0 <= left < corners[2] <= 1 and 0 <= top < corners[3] <= 1
            with Image.open(folder / "train_images" / f"{row['image_id']}.jpg") as picture:
                pixels = [round(edge * SIZE) for edge in corners]
                values = picture.crop(tuple(pixels)).convert("L").tobytes()
            light = sum(value > 170 for value in values) / len(values)
            dark = sum(value < 105 for value in values) / len(values)
            clear.append(min(light, dark) > 0.08 and light + dark > 0.7)
    assert sum(clear) > 0.9 * len(clear) > 10, sum(clear) / len(clear)


@pytest.mark.parametrize("split", SPLITS)
def test_chair_annotates_every_thing_that_coco_knows(
    split: str, data: Path, pictures: Path
) -> None:
    folder, scenes = data / split / "chair", by_id(pictures, split)
    instances, captions = (
        read(folder / f"{what}_val2014.json") for what in ("instances", "captions")
    )
    names = {row["id"]: row["name"] for row in instances["categories"]}
    assert {coco_ids.category(name) for name in COCO} == set(names.values())
    assert instances["images"] == captions["images"]
    boxes: dict[int, list[tuple[str | None, list[int]]]] = {}
    for row in instances["annotations"]:
        boxes.setdefault(row["image_id"], []).append((names[row["category_id"]], row["bbox"]))
    told: dict[int, list[str]] = {}
    for row in captions["annotations"]:
        told.setdefault(row["image_id"], []).append(row["caption"])
    for image in instances["images"]:
        facts = scenes[image["id"]].facts
        wanted = [
            (coco_ids.category(t.name), [*t.box[:2], t.box[2] - t.box[0], t.box[3] - t.box[1]])
            for t in facts.things
            if coco_ids.category(t.name) is not None
        ]
        assert boxes[image["id"]] == wanted != []
        assert len(told[image["id"]]) == 5 and told[image["id"]][0] == caption(facts)
        assert image["file_name"] == coco_name(image["id"])
        with Image.open(folder / "val2014" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])


@pytest.mark.parametrize("split", SPLITS)
def test_places_and_numbers_are_true(split: str, data: Path, pictures: Path) -> None:
    scenes = by_id(pictures, split)
    items = get_task("pope").read(data / split / "places")
    assert Counter(item.truth["label"] for item in items)["yes"] * 2 == len(items) > 0
    for item in items:
        one, other = item.text.split("?")[0].removeprefix("Is the ").split(" to the left of the ")
        pairs = scene_of(item, scenes).facts.beside()
        assert ((one, other) in pairs) == (item.truth["label"] == "yes")
        assert ((other, one) in pairs) == (item.truth["label"] == "no")
    items = get_task("textvqa-no-ocr").read(data / split / "counting")
    assert len(items) > 5
    for item in items:
        counts = scene_of(item, scenes).facts.counts
        name = next(n for n in counts if item.text.startswith(how_many(n)))
        assert set(item.truth["answers"]) == {str(counts[name])}


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
    assert main(["--out", str(tmp_path), "--items", "4"]) == 0
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
        (["--items", "0"], "at least 1"),
        (["--split", "unseen_backgrounds"], "heldout_data makes them"),
        (["--pictures", "nowhere"], r"no such file; make scenes with"),
        (["--tasks", "vqa"], "invalid choice: 'vqa'"),
    ],
)
def test_the_command_refuses_in_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "out"), *more])
    assert stopped.value.code == 2
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
