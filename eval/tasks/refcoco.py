"""RefCOCO, RefCOCO+, RefCOCOg: which box does an expression mean? (Kazemzadeh et al., EMNLP 2014; Yu et al.,
ECCV 2016; Mao et al., CVPR 2016)

Rule: right where intersection over union with the annotated box is at least one half, as in QwenLM/Qwen-VL
aa00ed0, eval_mm/evaluate_grounding.py; an answer without a box is wrong. How boxes are written differs between
families: boxes.py. `refcoco` asks and reads as LLaVA-1.5 does; `refcoco-internvl`, `refcoco-qwen` and
`refcoco-qwen3` as those do, and leave pictures unpadded.

Layouts read; all splits but train that are there, each also scored by itself:

- official (lichengunc/refer): `refs(unc).p`, `refs(google).p` or `refs(umd).p` and `instances.json` in the directory;
  pictures in `train2014`, `images`, `images/train2014`, or `train2014` beside it. The pickle is read
  without running anything;
- Qwen-VL's: `refcoco_{val,testA,testB}.jsonl` and so on (image, sent, bbox, width, height);
- hub (lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg): `val-*.parquet`, `testA-*.parquet` ... with the columns
  question_id, answer (the expressions), bbox, image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_flow.eval.tasks.base import (
    Item,
    Metrics,
    Scored,
    Task,
    Totals,
    accuracy_parts,
    counts_of,
    grouped_accuracy,
    ratio,
)
from vllm_flow.eval.tasks.boxes import Box, overlap, parse_box
from vllm_flow.eval.tasks.cells import picture_sizes, rows_and_pictures
from vllm_flow.eval.tasks.parquet import parquet_files
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    brief,
    directory,
    first_directory_with,
    json_rows,
    read_json,
    read_json_lines,
    read_plain_pickle,
)

SPLITS = ("val", "testA", "testB", "test")
REFS = ("refs(unc).p", "refs(google).p", "refs(umd).p")
IMAGE_FOLDERS = ("train2014", "images", "images/train2014", "../train2014", ".")
HALF = 0.5
FARTHEST = 1e6
"""Pixels; a box is nearer."""
LLAVA = "Please provide the bounding box coordinate of the region this sentence describes: {}"
PROMPTS = {
    "llava": LLAVA,
    "internvl": LLAVA.replace("coordinate of", "coordinates of").replace("{}", "<ref>{}</ref>"),
    "qwen": LLAVA,
    "qwen3": (
        'Locate every object that matches the description "{}" in the image. Report bbox coordinates in JSON '
        "format."
    ),
}
"""LLaVA's of its training data, InternVL's of its documentation. Qwen published none for one expression:
LLaVA's words stand for Qwen2-VL, those of lmms-eval 0.7.3 (refcoco_grounding) for Qwen3-VL."""


@dataclass(frozen=True)
class RefCoco(Task):
    """Referring expressions. An item is an expression; its group is the split."""

    name: str = "refcoco"
    boxes: str = "llava"
    """One of `vllm_flow.eval.tasks.boxes.CONVENTIONS`."""
    image_preparation: Literal["conversation", "pad", "plain"] = "pad"

    max_tokens = 64
    headline = "accuracy"
    parts = accuracy_parts(SPLITS)
    unclear = "have no box as this family writes it and count as wrong"

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        refs = next((data / name for name in REFS if (data / name).is_file()), None)
        if refs is not None:
            return list(self._official(data, refs))
        lines = [(s, p) for s in SPLITS for p in sorted(data.glob(f"refcoco*_{s}.jsonl"))]
        if lines:
            return [item for split, path in lines for item in self._lines(data, split, path)]
        items = [
            item
            for split in SPLITS
            for path in parquet_files(data, f"{split}-*.parquet")
            for item in self._hub(split, path)
        ]
        if not items:
            raise DataError(
                f"{data}: neither {REFS[0]} and instances.json, nor refcoco_val.jsonl, nor "
                "val-*.parquet of lmms-lab/RefCOCO"
            )
        return items

    def _official(self, data: Path, refs: Path) -> Iterator[Item]:
        path = data / "instances.json"
        content = Row(str(path), read_json(path, dict))
        pictures = {
            row.get("id", int): row for row in json_rows(path, content.get("images", list), "image")
        }
        boxes = {
            row.get("id", int): row
            for row in json_rows(path, content.get("annotations", list), "annotation")
        }
        names = [row.get("file_name", str) for row in pictures.values()]
        folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
        for row in json_rows(refs, read_plain_pickle(refs, list)):
            split = row.get("split", str)
            if split not in SPLITS:
                continue
            box, picture = boxes.get(row.get("ann_id", int)), pictures.get(row.get("image_id", int))
            if box is None or picture is None:
                raise DataError(f"{row.place}: its box or its picture is not in {path}")
            size = (picture.get("width", int), picture.get("height", int))
            name = picture.get("file_name", str)
            for sentence in json_rows(refs, row.get("sentences", list), "sentence"):
                yield self._item(
                    sentence.identifier("sent_id"), split, sentence.get("sent", str),
                    _corners(box, box.get("bbox", list)), size, str(folder / name), name,
                )  # fmt: skip

    def _lines(self, data: Path, split: str, path: Path) -> Iterator[Item]:
        rows = read_json_lines(path)
        names = [Path(row.get("image", str)).name for row in rows]
        folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
        for number, (row, name) in enumerate(zip(rows, names, strict=True)):
            size = (row.get("width", int), row.get("height", int))
            box, item = Box(*_four(row, row.get("bbox", list))), f"{split}/{number}"
            yield self._item(item, split, row.get("sent", str), box, size, str(folder / name), name)

    def _hub(self, split: str, path: Path) -> Iterator[Item]:
        rows = rows_and_pictures(path, ("question_id", "answer", "bbox"))
        for (row, image, name), size in zip(rows, picture_sizes(path), strict=True):
            given = row.get("answer", (list, str))
            texts = [given] if isinstance(given, str) else row.texts("answer")
            box = _corners(row, row.get("bbox", list))
            for place, text in enumerate(texts):
                item = f"{split}/{row.identifier('question_id')}/{place}"
                yield self._item(item, split, text, box, size, image, name)

    def _item(
        self,
        name: str,
        split: str,
        text: str,
        box: Box,
        size: tuple[int, int],
        image: str,
        picture: str,
    ) -> Item:
        truth: dict[str, Any] = {"box": list(box), "size": list(size), "expression": text}
        truth["image_id"] = picture
        return Item(name, PROMPTS[self.boxes].format(text), image, truth, split)

    def score(self, item: Item, text: str) -> Scored:
        box = parse_box(text, self.boxes, *item.truth["size"])
        share = overlap(box, Box(*item.truth["box"])) if box else 0.0
        right = float(share >= HALF)
        counts = {f"asked_{item.group}": 1.0, f"right_{item.group}": right, "overlap": share}
        said = [round(side, 2) for side in box] if box else None
        return Scored(item.id, said, right, counts, item.group, box is None)

    def metrics(self, totals: Totals) -> Metrics:
        asked = sum(counts_of(totals, *(f"asked_{split}" for split in SPLITS)))
        (shares,) = counts_of(totals, "overlap")
        return grouped_accuracy(totals, SPLITS) | {"mean_iou": ratio(shares, asked)}


def _four(row: Row, box: Sequence[Any]) -> list[float]:
    if len(box) != 4 or not all(
        isinstance(side, int | float) and abs(side) < FARTHEST for side in box
    ):
        raise DataError(f"{row.place}: the box is {brief(box)}, not four numbers")
    return list(map(float, box))


def _corners(row: Row, box: Sequence[Any]) -> Box:
    """COCO's left, top, width, height as corners."""
    left, top, width, height = _four(row, box)
    return Box(left, top, left + width, top + height)


TASK = RefCoco()
VARIANTS = tuple(
    RefCoco(name=f"refcoco-{family}", boxes=family, image_preparation="plain")
    for family in ("internvl", "qwen", "qwen3")
)
