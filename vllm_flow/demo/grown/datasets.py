"""Held-out pictures of the grown model in the files of four benchmarks: POPE, ScienceQA, TextVQA, CHAIR.

Left and right come as POPE's files, counting as TextVQA's.
`python -m vllm_flow.demo.grown.datasets --pictures DIR --out DIR` writes one folder per split, and in it
one per task, field for field as the official scorers read them. Questions are asked as in training
(`questions`), and everything is decided by the seed. Results on them are "POPE-style" and so on.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_flow.demo.datasets import pope, scienceqa, textvqa
from vllm_flow.demo.datasets.common import (
    image_id,
    shuffled,
    stream,
    write_jpeg,
    write_json,
    write_json_lines,
    write_scene,
)
from vllm_flow.demo.grown import questions
from vllm_flow.demo.grown.coco_files import write_chair
from vllm_flow.demo.grown.facts import Facts, Sign
from vllm_flow.demo.grown.heldout import SPLITS, HeldoutPicture, read_pictures
from vllm_flow.demo.grown.scenes import SIZE
from vllm_flow.demo.grown.vocabulary import CLASSES, KINDS, with_article

Pictures = Sequence[HeldoutPicture]
PROBLEMS = 2
"""Multiple-choice problems per picture, unless a number of items is given."""


def write_pope(pictures: Pictures, out: Path, items: int | None, seed: int) -> int:
    """Three label files; absent classes are drawn from those that the split's pictures can show."""
    shown = {name for picture in pictures for name in picture.objects}
    known = [name for name in CLASSES if name in shown]
    with_things = [picture for picture in pictures if picture.objects]
    return pope.write(with_things, out, items, seed, known, questions.presence)


def write_scienceqa(pictures: Pictures, out: Path, items: int | None, seed: int) -> int:
    """Problems on pictures, and one in six on words alone; returns how many have a picture."""
    rng = stream(seed, "grown/scienceqa")
    order = shuffled(pictures, rng)
    count = len(order) * PROBLEMS if items is None else items
    problems: dict[str, dict[str, Any]] = {}
    for number in range(count):
        if number % 5 == 4:
            problems[str(len(problems) + 1)] = _word_problem(rng)
        picture = order[number % len(order)]
        made = questions.choice(picture.facts, rng)
        pid = str(len(problems) + 1)
        problems[pid] = _problem(made, picture.facts)
        target = out / "images" / "test" / pid / "image.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(picture.image_path) as image:
            image.convert("RGB").save(target)
    write_json(problems, out / "problems.json")
    splits = {name: list(problems) if name == "test" else [] for name in scienceqa.SPLITS}
    write_json(splits, out / "pid_splits.json")
    return count


def _problem(made: questions.Choice, facts: Facts) -> dict[str, Any]:
    right = made.choices[made.answer]
    return scienceqa.problem(
        made.question,
        made.choices,
        right,
        hint=made.hint,
        image="image.png",
        topic=made.topic,
        lecture="Look at every part of the picture before you decide.",
        solution=f"{questions.caption(facts)} So the answer is {right}.",
    )


def _word_problem(rng: random.Random) -> dict[str, Any]:
    """A problem without a picture, which words alone decide."""
    # The last kind holds what fits nowhere else, so nothing is "one of it".
    kinds = dict(list(KINDS.items())[:-1])
    return scienceqa.without_picture(rng, kinds, CLASSES, with_article)


def write_textvqa(pictures: Pictures, out: Path, items: int | None, seed: int) -> int:
    """Two questions about every sign, so many that there are ``items``; returns how many."""
    rng = stream(seed, "grown/textvqa")
    order = shuffled([picture for picture in pictures if len(picture.facts.signs) == 1], rng)
    rows: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    for picture in order:
        if items is not None and len(rows) >= items:
            break
        name = f"{image_id(picture):016x}"  # 16 hexadecimal digits as in OpenImages
        with Image.open(picture.image_path) as image:
            write_jpeg(image, out / "train_images" / f"{name}.jpg")
        sign = picture.facts.signs[0]
        tokens.append(_ocr(name, sign, rng))
        for text in rng.sample(questions.SIGN_QUESTIONS, 2):
            if items is None or len(rows) < items:
                rows.append(_question(len(rows) + 1, text, name, sign, picture, rng))
    header = {"dataset_type": "val", "dataset_name": "textvqa-style"}
    write_json({**header, "dataset_version": "0.5.1", "data": rows}, out / "TextVQA_0.5.1_val.json")
    write_json(
        {**header, "dataset_version": "0.2", "data": tokens},
        out / "TextVQA_Rosetta_OCR_v0.2_val.json",
    )
    return len(rows)


def _question(
    number: int, text: str, name: str, sign: Sign, picture: HeldoutPicture, rng: random.Random
) -> dict[str, Any]:
    return {
        "question": text,
        "image_id": name,
        "image_classes": [object_.capitalize() for object_ in picture.objects],
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": SIZE,
        "image_height": SIZE,
        "answers": textvqa.answers(sign.word, rng),
        "question_tokens": text.rstrip("?").split(),
        "question_id": number,
        "set_name": "val",
    }


def _ocr(name: str, sign: Sign, rng: random.Random) -> dict[str, Any]:
    """One record of the OCR file: a reader that often adds words and sometimes misses the right one."""
    left, top, right, bottom = (edge / SIZE for edge in sign.box)
    box = {"x": left, "y": top, "w": right - left, "h": bottom - top}
    found = [(word, box) for word in questions.ocr_tokens(sign.word, rng)]
    return textvqa.ocr_record(name, found)


def write_places(pictures: Pictures, out: Path, items: int | None, seed: int) -> int:
    """Questions after left and right as a single POPE label file, as many with yes as with no."""
    rng = stream(seed, "grown/places")
    rows: list[dict[str, Any]] = []
    for picture in shuffled([picture for picture in pictures if picture.facts.beside()], rng):
        if items is not None and len(rows) >= items:
            break
        left, right = rng.choice(picture.facts.beside())
        for one, other, label in ((left, right, "yes"), (right, left, "no")):
            rows.append(
                {
                    "question_id": len(rows) + 1,
                    "image": write_scene(picture, out / "val2014"),
                    "text": questions.is_left(one, other),
                    "label": label,
                }
            )
    write_json_lines(rows, out / "coco_pope_random.json")
    return len(rows)


def write_counting(pictures: Pictures, out: Path, items: int | None, seed: int) -> int:
    """Counting questions in TextVQA's format: ten annotators who agree, and no OCR tokens."""
    rng = stream(seed, "grown/counting")
    rows: list[dict[str, Any]] = []
    for picture in shuffled(pictures, rng):
        if items is not None and len(rows) >= items:
            break
        name = questions.worth_counting(picture.facts, rng) if picture.objects else None
        if name is None:
            continue
        image = f"{image_id(picture):016x}"
        with Image.open(picture.image_path) as opened:
            write_jpeg(opened, out / "train_images" / f"{image}.jpg")
        rows.append(
            {
                "question": questions.how_many(name),
                "image_id": image,
                "answers": [str(picture.facts.counts[name])] * 10,
                "question_id": len(rows) + 1,
            }
        )
    write_json({"dataset_version": "0.5.1", "data": rows}, out / "TextVQA_0.5.1_val.json")
    return len(rows)


TASKS: Mapping[str, Callable[[Pictures, Path, int | None, int], int]] = {
    "pope": write_pope,
    "scienceqa": write_scienceqa,
    "textvqa": write_textvqa,
    "chair": write_chair,
    "places": write_places,
    "counting": write_counting,
}
"""Folder -> its writer. The last two have no benchmark: they borrow POPE's and TextVQA's formats."""


def write_datasets(
    pictures: Path,
    out: Path,
    split: str,
    items: int | None = None,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
) -> dict[str, int]:
    """Write a split's tasks below ``out``; returns how many items each holds.

    Args:
        pictures: a folder that ``heldout`` wrote.
        items: at most so many items per task (POPE: per label file), None for all.

    Raises ValueError for a split without pictures or ``items`` below 1.
    """
    if items is not None and items < 1:
        raise ValueError(f"items must be at least 1, got {items}")
    chosen = read_pictures(pictures, split)
    if not chosen:
        raise ValueError(f"{pictures} has no pictures of the split {split!r}")
    return {name: TASKS[name](chosen, out / name, items, seed) for name in tasks}


def main(argv: Sequence[str] | None = None) -> int:
    """Write every split that there are pictures of."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.demo.grown.datasets", description=__doc__
    )
    parser.add_argument("--pictures", type=Path, required=True, help="made by grown.heldout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--items", type=int, help="at most so many per task (POPE: per label file)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is asked (default: 0)")
    args = parser.parse_args(argv)
    try:
        there = {picture.split for picture in read_pictures(args.pictures)}
        for split in (split for split in SPLITS if split in there):
            counts = write_datasets(args.pictures, args.out / split, split, args.items, args.seed)
            print(f"{args.out / split}: {counts}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
