"""What the written data sets say of a picture is true of its scene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.demo_model.dataset_files import by_id, lines, read, scene_of
from tests.demo_model.truth import fitting
from vllm_flow.demo_model import coco_ids
from vllm_flow.demo_model.datasets.common import coco_name, image_id
from vllm_flow.demo_model.datasets.pope import CATEGORIES
from vllm_flow.demo_model.datasets.readme import COCO
from vllm_flow.demo_model.heldout import SPLITS, load_scenes
from vllm_flow.demo_model.questions import caption, how_many, presence
from vllm_flow.demo_model.scenes import SIZE
from vllm_flow.demo_model.vocabulary import CLASSES, KIND_OF, with_article
from vllm_flow.eval.tasks import get_task


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
