"""POPE: is there such an object in the image? (Li et al., "Evaluating Object Hallucination in Large
Vision-Language Models", EMNLP 2023)

Three categories of questions, which differ in how the absent objects were chosen, on pictures of three
sources: COCO val2014, whose annotations name the objects, and A-OKVQA (COCO val2014's pictures too) and GQA,
whose objects a segmentation (SEEM) found. `pope` reads the source whose files are there; `pope-coco`,
`pope-aokvqa` and `pope-gqa` read that one of several. Rule: RUCAIBox/POPE and LLaVA's
llava/eval/eval_pope.py, which agree. LLaVA reads pictures as stored, not as a server does (`Task`).

Layouts read:

- official: `coco_pope_random.json`, `coco_pope_popular.json`, `coco_pope_adversarial.json`, or
  `aokvqa_pope_seem_random.json` and so on, or `gqa_pope_seem_random.json` and so on (any of the
  three categories; JSON lines or one JSON list; with or without `seem_`) in the directory or in its
  `coco`, `output/coco`, `pope_coco`, and likewise for the other sources; the pictures in the directory
  itself, `val2014`, `images`, `coco/val2014`, or `val2014` beside it, GQA's also in `gqa/images` or
  `images` beside it;
- hub (lmms-lab/POPE): parquet files `test-*.parquet`, or `adversarial-*.parquet` and so on, with the
  columns question_id, question, answer, image_source, image, category; without image_source, a picture is known
  by its bytes.

The random category has 2910 questions in the version LLaVA used and 3000 today; the others 3000.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, counts_of, ratio
from vllm_flow.eval.tasks.cells import picture_digests
from vllm_flow.eval.tasks.parquet import parquet_files, parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    brief,
    by_unique,
    clipped,
    directory,
    first_directory_with,
    read_records,
)

YES = re.compile(r"\byes\b", re.IGNORECASE)
CATEGORIES = ("random", "popular", "adversarial")
SCORES = ("f1", "accuracy", "precision", "recall", "yes_ratio")
SUFFIX = "\nAnswer the question using a single word or phrase."
SOURCES = {"coco": "COCO", "aokvqa": "A-OKVQA", "gqa": "GQA"}
LABEL_FOLDERS = (".", "{}", "output/{}", "pope_{}", "output/seem/{}", "seem/{}")
"""Where label files are looked for; {} is the source."""
IMAGE_FOLDERS = (
    "val2014", ".", "images", "images/val2014", "coco/val2014", "../val2014",
    "gqa/images", "gqa", "../images", "../gqa/images",
)  # fmt: skip


def parse_yes_no(text: str) -> str:
    """`yes` or `no` by the official rule.

    Of the text before the first full stop, without commas and cut at every space character: `no` if
    a piece is exactly `No`, `no` or `not`, else `yes`. So `NO`, `No!`, `No\\n` and nothing are yes.
    """
    pieces = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(pieces) else "yes"


def label_files(data: Path, source: str) -> dict[str, Path]:
    """The label files of a source under `data`, by category; empty where there are none.

    DataError where a folder has two files for one category.
    """
    for folder in (data / name.format(source) for name in LABEL_FOLDERS):
        found: dict[str, Path] = {}
        for category in CATEGORIES:
            names = (f"{source}_pope_{category}.json", f"{source}_pope_seem_{category}.json")
            paths = [folder / name for name in names if (folder / name).is_file()]
            if len(paths) > 1:
                raise DataError(
                    f"{folder}: both {names[0]} and {names[1]}; keep the one whose questions were asked"
                )
            if paths:
                found[category] = paths[0]
        if found:
            return found
    return {}


@dataclass(frozen=True)
class Pope(Task):
    """POPE. An item's group is its category; its id is `category/question id`."""

    name: str = "pope"
    source: str | None = None
    """Of `SOURCES`; None for the one that is there."""

    max_tokens = 128
    headline = "f1"
    parts = MappingProxyType(
        {f"{score}_{category}": (category,) for score in SCORES for category in CATEGORIES}
    )
    unclear = "say neither yes nor no as the official rule reads them (`No`, `no`, `not`) and count as yes"

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        labels = self._labels(data)
        if labels:
            return self._official(data, labels)
        files = parquet_files(data, "test-*.parquet", *(f"{c}-*.parquet" for c in CATEGORIES))
        if files and self.source in (None, "coco"):
            return self._hub(data)
        sources = [self.source] if self.source else list(SOURCES)
        infix = {"coco": ""}
        names = [f"{source}_pope_{infix.get(source, 'seem_')}" for source in sources]
        told = " or ".join(f"{name}{{{','.join(CATEGORIES)}}}.json" for name in names)
        raise DataError(
            f"{data}: no label files {told} (here or in "
            f"{', '.join(folder.format(sources[0]) for folder in LABEL_FOLDERS[1:4])}), and no parquet "
            "files of lmms-lab/POPE (COCO's)"
        )

    def _labels(self, data: Path) -> dict[str, Path]:
        if self.source is not None:
            return label_files(data, self.source)
        found = {source: label_files(data, source) for source in SOURCES}
        there = [source for source, labels in found.items() if labels]
        if len(there) > 1:
            raise DataError(
                f"{data}: label files of {' and '.join(SOURCES[name] for name in there)}, which are scored "
                f"apart: take {' or '.join(f'pope-{name}' for name in there)} as the task, or a folder for each"
            )
        return found[there[0]] if there else {}

    def _official(self, data: Path, labels: dict[str, Path]) -> list[Item]:
        items = []
        for category, path in labels.items():
            rows = read_records(path, "questions")
            by_unique(((row.identifier("question_id"), row) for row in rows), "question id")
            names = [row.get("image", str) for row in rows]
            folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
            items += [
                _item(row, category, row.get("text", str), _label(row, "label"), name,
                      str(folder / name))
                for row, name in zip(rows, names, strict=True)
            ]  # fmt: skip
        return items

    def _hub(self, data: Path) -> list[Item]:
        files = parquet_files(data, "test-*.parquet") or [
            path for c in CATEGORIES for path in parquet_files(data, f"{c}-*.parquet")
        ]
        items = []
        for path in files:
            columns = ("question_id", "question", "answer", "category")
            rows = parquet_rows(path, columns, ("image_source",))
            # Where no column names the pictures, each of which has several questions, their bytes do.
            named = any(row.values.get("image_source") for row in rows)
            pictures = None if named else picture_digests(path)
            for number, row in enumerate(rows):
                category = row.get("category", str).lower()
                if category not in CATEGORIES:
                    raise DataError(f"{row.place}: unknown category {brief(category)}")
                name = str(row.values.get("image_source") or "")
                if name and not name.endswith(".jpg"):
                    name += ".jpg"
                picture = pictures[number] if pictures else None
                items.append(
                    _item(row, category, row.get("question", str), _label(row, "answer"), name,
                          parquet_image(path, number), picture)
                )  # fmt: skip
        _check_unique(items)
        return sorted(items, key=lambda item: CATEGORIES.index(item.group))

    def score(self, item: Item, text: str) -> Scored:
        parsed, label = parse_yes_no(text), item.truth["label"]
        right = parsed == label
        cell = ("t" if right else "f") + ("p" if parsed == "yes" else "n")
        counts = {f"{cell}_{item.group}": 1.0}
        unclear = parsed == "yes" and YES.search(text) is None
        return Scored(item.id, parsed, float(right), counts, item.group, unclear)

    def metrics(self, totals: Totals) -> Metrics:
        """Per category and, without suffix, the mean over the categories that have items."""
        metrics: Metrics = {}
        present = {}
        for category in CATEGORIES:
            tp, fp, tn, fn = counts_of(totals, *(f"{cell}_{category}" for cell in CELLS))
            total = tp + fp + tn + fn
            precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
            present[category] = ratio(total, total)
            metrics[f"f1_{category}"] = ratio(2 * precision * recall, precision + recall)
            metrics[f"accuracy_{category}"] = ratio(tp + tn, total)
            metrics[f"precision_{category}"] = precision
            metrics[f"recall_{category}"] = recall
            metrics[f"yes_ratio_{category}"] = ratio(tp + fp, total)
        categories = sum(present.values())
        for name in SCORES:
            metrics[name] = ratio(sum(metrics[f"{name}_{c}"] for c in CATEGORIES), categories)
        return metrics


CELLS = ("tp", "fp", "tn", "fn")


def _item(
    row: Row,
    category: str,
    question: str,
    label: str,
    name: str,
    image: str,
    picture: str | None = None,
) -> Item:
    number = row.identifier("question_id")
    truth = {"label": label, "question_id": number, "question": question, "image": name}
    if picture is not None:
        truth["image_id"] = picture
    return Item(f"{category}/{number}", question + SUFFIX, image, truth, category)


def _label(row: Row, key: str) -> str:
    label: str = row.get(key, str).strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{row.place}: {key} is {brief(row.values[key])}, neither yes nor no")
    return label


def _check_unique(items: list[Item]) -> None:
    seen = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"question {clipped(item.id)} comes twice in the parquet files")
        seen.add(item.id)


TASK = Pope()
VARIANTS = tuple(Pope(name=f"pope-{source}", source=source) for source in SOURCES)
