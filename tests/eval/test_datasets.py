"""The demo's pictures in four benchmarks' formats: complete, deterministic, true to the scenes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_flow.demo.classes import CLASSES
from vllm_flow.demo.datasets import TASKS, write_datasets
from vllm_flow.demo.datasets.__main__ import main
from vllm_flow.demo.datasets.chair import COCO
from vllm_flow.demo.datasets.common import coco_name, image_id
from vllm_flow.demo.datasets.pope import CATEGORIES
from vllm_flow.demo.heldout import HeldoutScene, load_scenes

ITEMS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("datasets")
    write_datasets(out, ITEMS, seed=3)
    return out


@pytest.fixture(scope="module")
def scenes() -> dict[str, HeldoutScene]:
    return {coco_name(image_id(scene)): scene for scene in load_scenes("seen")}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_seed_decides_every_byte(data: Path, tmp_path: Path) -> None:
    write_datasets(tmp_path / "again", ITEMS, seed=3)
    assert tree(tmp_path / "again") == tree(data)
    write_datasets(tmp_path / "other", ITEMS, seed=4)
    other = tree(tmp_path / "other")
    for name in TASKS:
        changed = [p for p, content in tree(data).items() if p.startswith(name)]
        assert any(other.get(path) != tree(data)[path] for path in changed), name


def test_a_task_does_not_depend_on_the_others(data: Path, tmp_path: Path) -> None:
    write_datasets(tmp_path, ITEMS, seed=3, tasks=["textvqa"])
    assert tree(tmp_path / "textvqa") == tree(data / "textvqa")
    assert not (tmp_path / "pope").exists()


@pytest.mark.parametrize("category", CATEGORIES)
def test_pope_labels_are_true_and_balanced(
    category: str, data: Path, scenes: dict[str, HeldoutScene]
) -> None:
    rows = lines(data / "pope" / f"coco_pope_{category}.json")
    assert len(rows) == ITEMS
    assert [row["question_id"] for row in rows] == list(range(1, ITEMS + 1))
    assert Counter(row["label"] for row in rows) == {"yes": ITEMS // 2, "no": ITEMS // 2}
    for row in rows:
        name = row["text"].removesuffix(" in the image?").split()[-1]
        assert (name in scenes[row["image"]].objects) == (row["label"] == "yes")
        assert (data / "pope" / "val2014" / row["image"]).exists()


def test_pope_files_share_the_yes_questions_and_differ_in_no(data: Path) -> None:
    by_label: dict[str, list[list[tuple[str, str]]]] = {"yes": [], "no": []}
    for category in CATEGORIES:
        rows = lines(data / "pope" / f"coco_pope_{category}.json")
        for label, found in by_label.items():
            found.append([(row["image"], row["text"]) for row in rows if row["label"] == label])
    first, second, third = by_label["yes"]
    assert first == second == third
    random, popular, adversarial = (Counter(text for _, text in rows) for rows in by_label["no"])
    assert len(random) > len(popular)
    assert by_label["no"][1] != by_label["no"][2]
    frequent = Counter(name for scene in load_scenes("seen") for name in scene.objects)
    most = frequent.most_common(1)[0][0]
    assert any(most in text for text in popular) and len(adversarial) > 1


def test_scienceqa_problems_are_answerable(data: Path) -> None:
    problems = read(data / "scienceqa" / "problems.json")
    assert read(data / "scienceqa" / "pid_splits.json")["test"] == list(problems)
    assert len(problems) == ITEMS
    by_pixels = {scene.image_path.read_bytes(): scene for scene in load_scenes("seen")}
    numbers = ("one", "two", "three", "four")
    kinds: Counter[str] = Counter()
    for pid, problem in problems.items():
        right = problem["choices"][problem["answer"]]
        assert 2 <= len(problem["choices"]) == len(set(problem["choices"])) <= 4
        picture = data / "scienceqa" / "images" / "test" / pid / "image.png"
        assert picture.exists() == (problem["image"] == "image.png")
        kinds[problem["question"].split(" in ")[0]] += 1
        if problem["image"] is None:
            continue
        objects = by_pixels[picture.read_bytes()].objects
        fits = [
            numbers.index(choice) + 1 == len(objects)
            if choice in numbers
            else (choice in objects) != ("not in" in problem["question"])
            for choice in problem["choices"]
        ]
        assert fits == [choice == right for choice in problem["choices"]]
    assert len(kinds) > 3
    assert {problem["hint"] == "" for problem in problems.values()} == {True, False}


def test_textvqa_joins_questions_answers_and_tokens(data: Path) -> None:
    folder = data / "textvqa"
    questions = read(folder / "TextVQA_0.5.1_val.json")["data"]
    ocr = {
        row["image_id"]: row for row in read(folder / "TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    }
    assert len(questions) == ITEMS
    assert len({(q["image_id"], q["question"].lower()) for q in questions}) == ITEMS
    agreed = []
    for question in questions:
        word, count = Counter(question["answers"]).most_common(1)[0]
        assert len(question["answers"]) == 10 and count >= 6
        tokens = ocr[question["image_id"]]["ocr_tokens"]
        assert tokens == [info["word"] for info in ocr[question["image_id"]]["ocr_info"]]
        agreed.append(word in tokens)
        with Image.open(folder / "train_images" / f"{question['image_id']}.jpg") as picture:
            assert picture.size == (question["image_width"], question["image_height"])
    assert 0.6 < sum(agreed) / ITEMS < 1, "some words are misread or not found"


def test_textvqa_signs_are_where_the_tokens_say(data: Path) -> None:
    """White letters inside the box, on a plate of one dark colour."""
    folder = data / "textvqa"
    for row in read(folder / "TextVQA_Rosetta_OCR_v0.2_val.json")["data"][:10]:
        with Image.open(folder / "train_images" / f"{row['image_id']}.jpg") as picture:
            for info in row["ocr_info"]:
                box = info["bounding_box"]
                x, y = box["top_left_x"] * picture.width, box["top_left_y"] * picture.height
                assert x >= 0 and x + box["width"] * picture.width <= picture.width
                assert y >= 0 and y + box["height"] * picture.height <= picture.height
                edge = 8
                plate = picture.crop(
                    (
                        int(x) + edge,
                        int(y) + edge,
                        int(x + box["width"] * picture.width) - edge,
                        int(y + box["height"] * picture.height) - edge,
                    )
                )
                values = list(plate.convert("L").tobytes())
                white = sum(value > 200 for value in values) / len(values)
                dark = sum(value < 130 for value in values) / len(values)
                assert 0.1 < white < 0.7 and dark > 0.25, (row["image_id"], white, dark)


def test_chair_annotations_are_the_objects_coco_knows(
    data: Path, scenes: dict[str, HeldoutScene]
) -> None:
    folder = data / "chair"
    seen: set[str] = set()
    for part in ("val", "train"):
        instances = read(folder / f"instances_{part}2014.json")
        captions = read(folder / f"captions_{part}2014.json")
        names = {category["id"]: category["name"] for category in instances["categories"]}
        assert sorted(names.values()) == sorted(COCO)
        assert instances["images"] == captions["images"]
        for image in instances["images"]:
            scene = scenes[image["file_name"]]
            annotated = {
                names[row["category_id"]]
                for row in instances["annotations"]
                if row["image_id"] == image["id"]
            }
            assert annotated == set(scene.objects) & set(COCO) != set()
            told = [r["caption"] for r in captions["annotations"] if r["image_id"] == image["id"]]
            assert len(told) == 5
            words = set(re.findall("[a-z]+", " ".join(told).lower()))
            assert words & set(CLASSES) == set(scene.objects), "the first caption names all"
            assert not seen & {image["file_name"]}
            seen.add(image["file_name"])
            assert (folder / "val2014" / image["file_name"]).exists() == (part == "val")
        if part == "val":
            assert len(instances["images"]) == ITEMS


def test_everything_is_used_without_a_limit(tmp_path: Path) -> None:
    counts = write_datasets(tmp_path, split="unseen_style", tasks=["pope", "scienceqa", "chair"])
    scenes = load_scenes("unseen_style")
    assert counts["pope"] == sum(3 * 2 * min(3, len(scene.objects)) for scene in scenes)
    assert counts["scienceqa"] == len(scenes) * 5 // 4
    assert "CC-BY-SA-4.0" in (tmp_path / "README.md").read_text()


def test_the_readme_denies_being_the_benchmarks(data: Path) -> None:
    text = (data / "README.md").read_text()
    assert "not the benchmarks" in text and "cannot read" in text
    assert all(f"`{name}/`" in text for name in TASKS)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--items", "4", "--tasks", "chair", "pope"]) == 0
    printed = capsys.readouterr().out
    assert "chair: 4 items" in printed and "pope: 12 items" in printed
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--items", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [({"tasks": ["vqa"]}, "pope, scienceqa"), ({"split": "photo"}, "not known")],
)
def test_refusals(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_datasets(tmp_path, **arguments)
