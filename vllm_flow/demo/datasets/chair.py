"""CHAIR-style: COCO's annotation files for the scenes, as the official scorer reads them.

The scorer (Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018) knows COCO's 80
categories. Sixteen of the demo's classes are among them, under the same names (`COCO`); the other
eight (rabbit, fish, butterfly, rocket, tree, flower, guitar, camera) it neither finds in a caption
nor counts as present. Scenes with none of the sixteen are left out.

Where in a scene an object stands is not recorded, so annotations have neither `bbox` nor
`segmentation`; the scorer reads neither. Scenes that are not asked about are the `train` files.

Layout: `{instances,captions}_{train,val}2014.json`, `val2014/COCO_val2014_*.jpg`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_flow.demo.classes import caption_of, with_article
from vllm_flow.demo.datasets.common import (
    coco_name,
    image_id,
    shuffled,
    stream,
    write_json,
    write_scene,
)
from vllm_flow.demo.heldout import HeldoutScene

COCO: dict[str, tuple[int, str]] = {
    "bicycle": (2, "vehicle"),
    "car": (3, "vehicle"),
    "airplane": (5, "vehicle"),
    "bus": (6, "vehicle"),
    "train": (7, "vehicle"),
    "boat": (9, "vehicle"),
    "bird": (16, "animal"),
    "cat": (17, "animal"),
    "dog": (18, "animal"),
    "horse": (19, "animal"),
    "cow": (21, "animal"),
    "elephant": (22, "animal"),
    "cup": (47, "kitchen"),
    "banana": (52, "food"),
    "apple": (53, "food"),
    "clock": (85, "indoor"),
}
"""The demo's classes that are COCO categories: the category's id and supercategory there."""

REFERENCES = 5
"""Captions per picture, as in COCO."""


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write annotations and pictures; returns the number of pictures in `val`."""
    rng = stream(seed, "chair")
    order = shuffled([scene for scene in scenes if set(scene.objects) & set(COCO)], rng)
    parts = {"val": order[:items], "train": order[items:] if items is not None else []}
    for part, chosen in parts.items():
        images = [image_record(scene) for scene in chosen]
        header = {"info": {"description": f"CHAIR-style demo scenes, {part}"}, "licenses": []}
        categories = [
            {"supercategory": above, "id": number, "name": name}
            for name, (number, above) in COCO.items()
        ]
        write_json(
            {
                **header,
                "images": images,
                "annotations": instances(chosen),
                "categories": categories,
            },
            out / f"instances_{part}2014.json",
        )
        write_json(
            {**header, "images": images, "annotations": captions(chosen, rng)},
            out / f"captions_{part}2014.json",
        )
    for scene in parts["val"]:
        write_scene(scene, out / "val2014")
    return len(parts["val"])


def image_record(scene: HeldoutScene) -> dict[str, Any]:
    """One entry of `images`."""
    number = image_id(scene)
    with Image.open(scene.image_path) as image:
        width, height = image.size
    return {
        "license": 0,
        "file_name": coco_name(number),
        "height": height,
        "width": width,
        "id": number,
    }


def instances(scenes: Sequence[HeldoutScene]) -> list[dict[str, Any]]:
    """One annotation per object that COCO knows."""
    known = [(scene, name) for scene in scenes for name in scene.objects if name in COCO]
    return [
        {"id": number, "image_id": image_id(scene), "category_id": COCO[name][0], "iscrowd": 0}
        for number, (scene, name) in enumerate(known, start=1)
    ]


def captions(scenes: Sequence[HeldoutScene], rng: random.Random) -> list[dict[str, Any]]:
    """Five reference captions per scene; all but the first leave some objects out, as people do."""
    rows: list[dict[str, Any]] = []
    for scene in scenes:
        for number in range(REFERENCES):
            count = len(scene.objects) if number == 0 else rng.randint(1, len(scene.objects))
            names = rng.sample(scene.objects, count)
            rows.append(
                {"image_id": image_id(scene), "id": len(rows) + 1, "caption": sentence(names, rng)}
            )
    return rows


def sentence(names: Sequence[str], rng: random.Random) -> str:
    """A caption that names these objects and no other thing."""
    listed = caption_of(names).rstrip(".")
    beside = " beside ".join(with_article(name) for name in names)
    form = rng.choice(("{}", "There is {} here", "We see {}", "This shows {}"))
    text = form.format(rng.choice((listed, beside)))
    return text[0].upper() + text[1:] + "."
