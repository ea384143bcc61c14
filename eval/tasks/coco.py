"""What COCO 2014's annotation files say is in an image. Knows nothing of how captions are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from vllm_flow.eval.tasks.reading import DataError, Row, brief, json_rows, read_json

FOLDERS = (".", "annotations")
SPLITS = ("val", "train")
KINDS = ("instances", "captions")


class Annotations(NamedTuple):
    """Annotations of the wanted images, by image id."""

    objects: dict[int, set[str]]
    files: dict[int, str]
    """The pictures' file names."""


def read(
    data: Path,
    names: Mapping[str, str],
    mentioned: Callable[[str], list[str]],
    images: Collection[int] | None = None,
) -> Annotations:
    """The objects of each image over all splits that are under `data`: those of its instances, by
    `names` (category -> object), united with those its reference captions mention.

    `images` None takes all. Crowds count. DataError where files are missing or do not fit together.
    """
    annotations = Annotations({}, {})
    folder = _folder(data)
    for split in _splits(folder):
        for kind in KINDS:
            path = _path(folder, kind, split)
            content = Row(str(path), read_json(path, dict))
            for row in json_rows(path, content.get("images", list), "image"):
                image = row.get("id", int)
                if images is None or image in images:
                    annotations.objects.setdefault(image, set())
                    name = row.values.get("file_name") or f"COCO_{split}2014_{image:012d}.jpg"
                    annotations.files.setdefault(image, str(name))
            rows = (
                row
                for row in json_rows(path, content.get("annotations", list), "annotation")
                if row.get("image_id", int) in annotations.objects
            )
            if kind == "instances":
                found = _categories(rows, _category_names(path, content, names))
            else:
                found = ((row, mentioned(row.get("caption", str))) for row in rows)
            for row, objects in found:
                annotations.objects[row.values["image_id"]].update(objects)
    return annotations


def image_ids(data: Path, split: str) -> list[int]:
    """The ids of a split's images, sorted."""
    folder = _folder(data)
    if split not in _splits(folder):
        raise DataError(
            f"{folder}: no {' and '.join(f'{kind}_{split}2014.json' for kind in KINDS)}"
        )
    path = _path(folder, "captions", split)  # the smaller file; both list all images
    content = Row(str(path), read_json(path, dict))
    return sorted(
        row.get("id", int) for row in json_rows(path, content.get("images", list), "image")
    )


def is_here(data: Path) -> bool:
    """Whether there are annotation files under `data`."""
    return any(_path(data / f, k, s).is_file() for f in FOLDERS for k in KINDS for s in SPLITS)


def _category_names(path: Path, content: Row, names: Mapping[str, str]) -> dict[int, str]:
    found = {}
    for row in json_rows(path, content.get("categories", list), "category"):
        name = row.get("name", str)
        if name not in names:
            raise DataError(f"{row.place}: {brief(name)} is no COCO object of CHAIR's table")
        found[row.get("id", int)] = names[name]
    return found


def _categories(rows: Iterator[Row], names: Mapping[int, str]) -> Iterator[tuple[Row, list[str]]]:
    for row in rows:
        category = row.get("category_id", int)
        if category not in names:
            raise DataError(
                f"{row.place}: category {brief(category)} is not among the file's categories"
            )
        yield row, [names[category]]


def _folder(data: Path) -> Path:
    for folder in FOLDERS:
        if _splits(data / folder):
            return data / folder
    raise DataError(
        f"{data}: needs instances_val2014.json and captions_val2014.json (for images of train2014 also "
        f"its two), here or in {FOLDERS[1]}"
    )


def _splits(folder: Path) -> list[str]:
    """The splits in a folder; DataError where one has only one of its two files."""
    splits = []
    for split in SPLITS:
        missing = [path for kind in KINDS if not (path := _path(folder, kind, split)).is_file()]
        if len(missing) == 1:
            raise DataError(f"{missing[0]}: no such file; the ground truth needs it too")
        if not missing:
            splits.append(split)
    return splits


def _path(folder: Path, kind: str, split: str) -> Path:
    return folder / f"{kind}_{split}2014.json"
