"""Writes tiny benchmark files in the official and the hub layouts."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def json_file(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def hub_image(colour: tuple[int, int, int]) -> dict[str, Any]:
    """An image as the hub's parquet files hold it."""
    return {"bytes": png(colour), "path": "picture.png"}


def parquet(path: Path, records: Sequence[Mapping[str, Any]], rows_per_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dict(record) for record in records])
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def image_file(path: Path, colour: tuple[int, int, int] = (1, 2, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    return path


POPE_OBJECTS = {
    "random": ("sink", "dog", "cat", "car"),
    "popular": ("sink", "dog", "person", "chair"),
    "adversarial": ("sink", "dog", "fork", "knife"),
}
"""Asked on one picture, which shows the first two; like POPE's categories, they differ in the rest."""


def pope_labels(folder: Path, sizes: Mapping[str, int] | None = None) -> Path:
    """The three label files: per category `size` questions, four to a picture, counted from 1."""
    for category, objects in POPE_OBJECTS.items():
        size = (sizes or {}).get(category, 4)
        json_lines(
            folder / f"coco_pope_{category}.json",
            (
                {
                    "question_id": i + 1,
                    "image": f"COCO_val2014_{i // 4:012d}.jpg",
                    "text": f"Is there a {objects[i % 4]} in the image?",
                    "label": "yes" if i % 4 < 2 else "no",
                }
                for i in range(size)
            ),
        )
    return folder


def coco(folder: Path, splits: Mapping[str, Mapping[int, tuple[list[str], list[str]]]]) -> Path:
    """COCO's annotation files: split -> image id -> (categories of its instances, captions)."""
    names = ["person", "dog", "car", "chair", "toilet", "wine glass", "bus", "tv", "tie", "cat"]
    for split, images in splits.items():
        listed = [{"id": i, "file_name": f"COCO_{split}2014_{i:012d}.jpg"} for i in images]
        instances = [
            {"image_id": i, "category_id": names.index(name) + 1, "iscrowd": n % 2}
            for i, (objects, _) in images.items()
            for n, name in enumerate(objects)
        ]
        captions = [
            {"image_id": i, "caption": caption}
            for i, (_, texts) in images.items()
            for caption in texts
        ]
        categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
        json_file(
            folder / f"instances_{split}2014.json",
            {"images": listed, "annotations": instances, "categories": categories},
        )
        json_file(
            folder / f"captions_{split}2014.json", {"images": listed, "annotations": captions}
        )
    return folder


def arguments(data: Path) -> Namespace:
    """What `vllm-flow eval` is told of questions, all by default."""
    return Namespace(
        data=data, seed=0, prompts="llava", image_preparation="auto", image_reading="server"
    )
