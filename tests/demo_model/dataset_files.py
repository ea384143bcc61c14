"""Reads the written data sets as they stand in their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_flow.demo_model.datasets.common import image_id
from vllm_flow.demo_model.heldout import HeldoutScene, load_scenes
from vllm_flow.eval.tasks.base import Item


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
