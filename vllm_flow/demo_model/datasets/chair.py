"""CHAIR-style: COCO's annotation files for held-out scenes.

Instances have a thing's box; reference captions name things as the training's captions do. Layout:
`{instances,captions}_val2014.json`, `val2014/COCO_val2014_*.jpg`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo_model import coco_ids, questions
from vllm_flow.demo_model.datasets.common import (
    coco_name,
    image_id,
    shuffled,
    stream,
    write_json,
    write_scene,
)
from vllm_flow.demo_model.heldout import HeldoutScene
from vllm_flow.demo_model.scenes import SIZE
from vllm_flow.demo_model.vocabulary import counted, listed


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """COCO's annotations, one instance per thing with its box; scenes without a category are left out."""
    rng = stream(seed, "chair")
    fitting = [scene for scene in scenes if any(map(coco_ids.category, scene.objects))]
    chosen = shuffled(fitting, rng)[:items]
    images = [
        {"license": 0, "file_name": coco_name(image_id(scene)), "height": SIZE, "width": SIZE,
         "id": image_id(scene)}
        for scene in chosen
    ]  # fmt: skip
    header = {"info": {"description": "CHAIR-style demo scenes, val"}, "licenses": []}
    categories = [
        {"supercategory": above, "id": number, "name": name}
        for name, (number, above) in coco_ids.CATEGORIES.items()
    ]
    annotations = _instances(chosen)
    write_json(
        {**header, "images": images, "annotations": annotations, "categories": categories},
        out / "instances_val2014.json",
    )
    write_json(
        {**header, "images": images, "annotations": _references(chosen, rng)},
        out / "captions_val2014.json",
    )
    for scene in chosen:
        write_scene(scene, out / "val2014")
    return len(chosen)


def _instances(scenes: Sequence[HeldoutScene]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for scene in scenes:
        for thing in scene.facts.things:
            name = coco_ids.category(thing.name)
            if name is None:
                continue
            left, top, right, bottom = thing.box
            width, height = right - left, bottom - top
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": image_id(scene),
                    "category_id": coco_ids.CATEGORIES[name][0],
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    return rows


def _references(scenes: Sequence[HeldoutScene], rng: random.Random) -> list[dict[str, Any]]:
    """Five captions per scene; all but the first leave some things out, as people do."""
    rows: list[dict[str, Any]] = []
    for scene in scenes:
        for number in range(5):
            counts = dict(scene.facts.counts)
            if number:
                kept = rng.sample(list(counts), rng.randint(1, len(counts)))
                text = listed([counted(name, counts[name]) for name in counts if name in kept])
                text = f"{rng.choice(('There is', 'We see', 'This shows'))} {text}."
            else:
                text = questions.caption(scene.facts)
            rows.append({"image_id": image_id(scene), "id": len(rows) + 1, "caption": text})
    return rows
