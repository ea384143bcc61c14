"""What the writers share: seeds, COCO's file names, pictures and JSON. Knows no task."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_flow.demo_model.heldout import HeldoutScene

FIRST_IDS = {"unseen_style": 1001, "unseen_photos": 2001, "unseen_backgrounds": 3001}
"""Split -> image id of its picture 0; 1 for the others."""

JPEG = {"quality": 95, "subsampling": 0}
"""Close to the originals: the small pictures have hard edges, which chroma subsampling smears."""


def stream(seed: int, task: str) -> random.Random:
    """A task's own stream of random numbers, so that no task's draws move another's."""
    return random.Random(f"{task}/{seed}")


def shuffled(scenes: Sequence[HeldoutScene], rng: random.Random) -> list[HeldoutScene]:
    """The scenes in drawn order."""
    order = list(scenes)
    rng.shuffle(order)
    return order


def image_id(scene: HeldoutScene) -> int:
    """A scene's COCO image id: its file's number after the split's first id."""
    return int(scene.image_path.stem) + FIRST_IDS.get(scene.split, 1)


def coco_name(number: int) -> str:
    """COCO's name of a picture in val2014."""
    return f"COCO_val2014_{number:012d}.jpg"


def write_jpeg(image: Image.Image, path: Path) -> None:
    """Save as JPEG, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(path, "JPEG", **JPEG)


def write_scene(scene: HeldoutScene, folder: Path) -> str:
    """Save a scene under its COCO name; returns the name."""
    name = coco_name(image_id(scene))
    with Image.open(scene.image_path) as image:
        write_jpeg(image, folder / name)
    return name


def write_json(value: Any, path: Path) -> None:
    """One JSON value per file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_json_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
