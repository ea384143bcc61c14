"""ScienceQA-style: multiple choice with context on a scene, and some problems without a picture.

Fields and folders are those of Lu et al., "Learn to Explain", NeurIPS 2022: every problem has a
question, two to four choices, the index of the right one, a hint (often empty), a lecture and a
solution. One problem in six has no picture, as about half of the original's test has none.

Layout: `problems.json`, `pid_splits.json`, `images/test/{id}/image.png`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.datasets.common import shuffled, stream, write_json
from vllm_flow.demo_model.facts import Facts
from vllm_flow.demo_model.heldout import HeldoutScene
from vllm_flow.demo_model.vocabulary import CLASSES, KINDS, with_article

PER_SCENE = 2
"""Problems per scene, unless a number of items is given."""
SPLITS = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest")
"""The keys of the original `pid_splits.json`; only `test` is filled here."""


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write problems, splits and pictures; returns the number of problems that have a picture."""
    rng = stream(seed, "scienceqa")
    order = shuffled(scenes, rng)
    count = len(order) * PER_SCENE if items is None else items
    problems: dict[str, dict[str, Any]] = {}
    for number in range(count):
        if number % 5 == 4:
            problems[str(len(problems) + 1)] = without_picture(rng)
        scene = order[number % len(order)]
        pid = str(len(problems) + 1)
        problems[pid] = about(scene.facts, rng)
        picture = out / "images" / "test" / pid / "image.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(scene.image_path) as image:
            image.convert("RGB").save(picture)
    write_json(problems, out / "problems.json")
    splits = {name: list(problems) if name == "test" else [] for name in SPLITS}
    write_json(splits, out / "pid_splits.json")
    return count


def about(facts: Facts, rng: random.Random) -> dict[str, Any]:
    """A problem that the scene decides: what is there, how many, where, what a sign says."""
    made = questions.choice(facts, rng)
    right = made.choices[made.answer]
    return problem(
        made.question,
        made.choices,
        right,
        hint=made.hint,
        image="image.png",
        topic=made.topic,
        lecture="Look at every part of the picture before you decide.",
        solution=f"{questions.caption(facts)} So the answer is {right}.",
    )


def without_picture(rng: random.Random) -> dict[str, Any]:
    """A problem that words alone decide: which of some things is of a kind."""
    # The last kind holds what fits nowhere else, so nothing is "one of it".
    kind = rng.choice(list(KINDS)[:-1])
    right = rng.choice(KINDS[kind])
    others = [name for name in CLASSES if name not in KINDS[kind]]
    choices = [right, *rng.sample(others, rng.randint(1, 3))]
    rng.shuffle(choices)
    return problem(
        f"Which of these is {with_article(kind)}?",
        choices,
        right,
        hint="",
        image=None,
        topic="words",
        lecture="A word can stand for one of a larger group of things.",
        solution=f"{with_article(right).capitalize()} is {with_article(kind)}.",
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
