"""ScienceQA-style: multiple choice over the objects of a scene, and some questions without a picture.

Fields and folders are those of Lu et al., "Learn to Explain", NeurIPS 2022: every problem has a
question, two to four choices, the index of the right one, a hint (often empty), a lecture and a
solution. One problem in five has no picture, as about half of the original's test has none.

Layout: `problems.json`, `pid_splits.json`, `images/test/{id}/image.png`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo.classes import CLASSES, with_article
from vllm_flow.demo.datasets.common import shuffled, stream, write_json
from vllm_flow.demo.heldout import HeldoutScene

KINDS: dict[str, tuple[str, ...]] = {
    "animal": CLASSES[0:9],
    "vehicle": CLASSES[9:16],
    "plant or fruit": CLASSES[16:20],
}
"""What the questions without a picture ask for; the other classes are none of these."""

NUMBERS = ("one", "two", "three", "four")
HINT = "The picture shows drawings of objects on a painted background."
SPLITS = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest")
"""The keys of the original `pid_splits.json`; only `test` is filled here."""


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write problems, splits and pictures; returns the number of problems (all in `test`).

    By default one problem with a picture per scene, and one without per four of these.
    """
    rng = stream(seed, "scienceqa")
    order = shuffled(scenes, rng)
    count = len(order) + len(order) // 4 if items is None else items
    problems: dict[str, dict[str, Any]] = {}
    used = 0
    for number in range(1, count + 1):
        pid = str(number)
        if number % 5 == 0:
            problems[pid] = without_picture(rng)
            continue
        scene = order[used % len(order)]
        used += 1
        problems[pid] = about(scene, rng)
        picture = out / "images" / "test" / pid / "image.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(scene.image_path, picture)
    write_json(problems, out / "problems.json")
    splits = {name: list(problems) if name == "test" else [] for name in SPLITS}
    write_json(splits, out / "pid_splits.json")
    return count


def about(scene: HeldoutScene, rng: random.Random) -> dict[str, Any]:
    """A problem on a scene: what is in it, what is not, or how many kinds of things."""
    absent = [name for name in CLASSES if name not in scene.objects]
    kind = rng.choice(("present", "present", "absent", "count"))
    if kind == "absent" and len(scene.objects) == 1:
        kind = "present"
    listed = ", ".join(with_article(name) for name in scene.objects)
    if kind == "count":
        question = "How many different kinds of objects are in the picture?"
        choices, right = list(NUMBERS), NUMBERS[len(scene.objects) - 1]
    elif kind == "absent":
        question = "Which of these objects is not in the picture?"
        right = rng.choice(absent)
        choices = [right, *rng.sample(scene.objects, min(3, len(scene.objects)))]
    else:
        question = "Which of these objects is in the picture?"
        right = rng.choice(scene.objects)
        choices = [right, *rng.sample(absent, rng.randint(1, 3))]
    if kind != "count":
        rng.shuffle(choices)
    return problem(
        question,
        choices,
        right,
        hint=HINT if rng.random() < 0.5 else "",
        image="image.png",
        topic="objects",
        lecture="Look at every part of the picture before you decide.",
        solution=f"In the picture: {listed}. So the answer is {right}.",
    )


def without_picture(
    rng: random.Random,
    kinds: Mapping[str, Sequence[str]] = KINDS,
    classes: Sequence[str] = CLASSES,
    article: Callable[[str], str] = with_article,
) -> dict[str, Any]:
    """A problem that words alone decide: which of some ``classes`` is of one of the ``kinds``."""
    kind = rng.choice(list(kinds))
    right = rng.choice(kinds[kind])
    others = [name for name in classes if name not in kinds[kind]]
    choices = [right, *rng.sample(others, rng.randint(1, 3))]
    rng.shuffle(choices)
    return problem(
        f"Which of these is {article(kind)}?",
        choices,
        right,
        hint="",
        image=None,
        topic="words",
        lecture="A word can stand for one of a larger group of things.",
        solution=f"{article(right).capitalize()} is {article(kind)}.",
    )


def problem(
    question: str,
    choices: Sequence[str],
    right: str,
    *,
    hint: str,
    image: str | None,
    topic: str,
    lecture: str,
    solution: str,
) -> dict[str, Any]:
    """One value of `problems.json`."""
    return {
        "question": question,
        "choices": list(choices),
        "answer": choices.index(right),
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": "grade1",
        "subject": "natural science",
        "topic": topic,
        "category": topic.capitalize(),
        "skill": question.rstrip("?"),
        "lecture": lecture,
        "solution": solution,
        "split": "test",
    }
