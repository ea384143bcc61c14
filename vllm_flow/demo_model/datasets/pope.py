"""POPE-style: presence questions in three files that differ in how the absent objects are drawn.

After the recipe of Li et al., "Evaluating Object Hallucination in Large Vision-Language Models",
EMNLP 2023: per picture as many questions with the answer yes as no, taking turns; at most three each.
Absent objects are drawn evenly (`random`), are the most frequent of the pictures (`popular`), or go
most often together with what is in the picture (`adversarial`). The yes questions of the files agree.

Layout: `coco_pope_{random,popular,adversarial}.json` (JSON lines), `val2014/COCO_val2014_*.jpg`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.datasets.common import (
    coco_name,
    image_id,
    shuffled,
    stream,
    write_json_lines,
    write_scene,
)
from vllm_flow.demo_model.heldout import HeldoutScene
from vllm_flow.demo_model.vocabulary import CLASSES

CATEGORIES = ("random", "popular", "adversarial")
PER_PICTURE = 3
"""Questions with the answer yes per picture, at most, and as many with no."""


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write the three label files and their pictures; returns the questions in all of them.

    With `items`, each file ends after so many questions (one less where that is odd, but no fewer
    than two), so that yes and no stay as many. Only things that some scene shows are asked for.
    """
    scenes = [scene for scene in scenes if scene.objects]
    chosen = shuffled(scenes, stream(seed, "pope"))
    limit = None if items is None else max(items // 2, 1)
    total = 0
    asked: set[str] = set()
    for category in CATEGORIES:
        # The same stream for each file: the present objects are drawn first, so they agree.
        rows = label_rows(chosen, category, scenes, stream(seed, "pope/objects"), limit)
        write_json_lines(rows, out / f"coco_pope_{category}.json")
        asked |= {row["image"] for row in rows}
        total += len(rows)
    for scene in scenes:
        if coco_name(image_id(scene)) in asked:
            write_scene(scene, out / "val2014")
    return total


def label_rows(
    chosen: Sequence[HeldoutScene],
    category: str,
    known: Sequence[HeldoutScene],
    rng: random.Random,
    pairs: int | None = None,
) -> list[dict[str, Any]]:
    """The lines of one label file, at most `pairs` times yes and no.

    `known` are the scenes whose statistics `popular` and `adversarial` go by.
    """
    frequent = Counter(name for scene in known for name in scene.objects)
    together = Counter(
        (one, other)
        for scene in known
        for one in scene.objects
        for other in scene.objects
        if one != other
    )
    shown = [name for name in CLASSES if frequent[name]]
    rows: list[dict[str, Any]] = []
    for scene in chosen:
        count = min(PER_PICTURE, len(scene.objects))
        present = rng.sample(scene.objects, count)
        absent = [name for name in shown if name not in scene.objects]
        rng.shuffle(absent)
        # The sort is stable, so that ties stay in drawn order.
        if category == "popular":
            absent.sort(key=lambda name: -frequent[name])
        elif category == "adversarial":
            absent.sort(key=lambda name: -sum(together[name, seen] for seen in scene.objects))
        for yes, no in zip(present, absent, strict=False):
            if pairs is not None and len(rows) >= 2 * pairs:
                return rows
            for name, label in ((yes, "yes"), (no, "no")):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": coco_name(image_id(scene)),
                        "text": questions.presence(name),
                        "label": label,
                    }
                )
    return rows
