"""OCRBench: a thousand questions whose answers are to be read. (Liu et al., SCIENCE CHINA 67, 2024)

Rule: Yuliang-Liu/MultimodalOCR 794c36d, OCRBench/example.py: right where an answer occurs in what was said,
case and outer white space aside, line ends being spaces; in handwritten formulas (HME100k) without any spaces
and with case. The score is the number of right answers out of 1000. Prompts: LLaVA's of
scripts/LLaVA1_5.py.

Layouts read:

- official: `OCRBench.json` in the directory or its `OCRBench`, pictures under `OCRBench_Images` or beside it;
- hub (echo840/OCRBench): `test-*.parquet` with the columns dataset, question, question_type, answer, image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vllm_flow.eval.tasks.base import (
    Item,
    Metrics,
    Scored,
    Task,
    Totals,
    counts_of,
    ratio,
)
from vllm_flow.eval.tasks.cells import rows_and_pictures
from vllm_flow.eval.tasks.parquet import parquet_files
from vllm_flow.eval.tasks.prompts import short_answer
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    brief,
    directory,
    first_directory_with,
    first_file,
    json_rows,
    read_json,
)

PARTS = {
    "recognition": (
        "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
        "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition",
    ),
    "scene_vqa": ("Scene Text-centric VQA",),
    "document_vqa": ("Doc-oriented VQA",),
    "key_information": ("Key Information Extraction",),
    "formulas": ("Handwritten Mathematical Expression Recognition",),
}  # fmt: skip
"""The table's five parts, and the question types that each sums up."""
PART_OF = {kind: part for part, kinds in PARTS.items() for kind in kinds}
FORMULAS = "HME100k"
IMAGE_FOLDERS = ("OCRBench_Images", "../OCRBench_Images", ".", "images")


def folded(text: str, dataset: str) -> str:
    """A text as the rule compares it."""
    if dataset == FORMULAS:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")


@dataclass(frozen=True)
class OcrBench(Task):
    """OCRBench. An item's group is its part of the table."""

    name = "ocrbench"
    prompts: str = "llava"

    max_tokens = 128
    headline = "score"
    full_marks = MappingProxyType(
        {"score": 1000.0, "recognition": 300.0, "scene_vqa": 200.0, "document_vqa": 200.0,
         "key_information": 200.0, "formulas": 100.0}
    )  # fmt: skip
    parts = MappingProxyType({part: (part,) for part in PARTS})

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        path = first_file(data, "OCRBench.json", (".", "OCRBench", "OCRBench/OCRBench"))
        if path is not None:
            rows = json_rows(path, read_json(path, list))
            names = [row.get("image_path", str) for row in rows]
            folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
            return [
                self._item(row, n, ("dataset_name", "type", "answers"), str(folder / name), name)
                for n, (row, name) in enumerate(zip(rows, names, strict=True))
            ]
        files = parquet_files(data, "test-*.parquet")
        if not files:
            raise DataError(f"{data}: neither OCRBench.json nor test-*.parquet of echo840/OCRBench")
        items: list[Item] = []
        keys = ("dataset", "question_type", "answer")
        for file in files:
            for row, image, picture in rows_and_pictures(file, (*keys, "question")):
                items.append(self._item(row, len(items), keys, image, picture))
        return items

    def _item(
        self, row: Row, number: int, keys: tuple[str, str, str], image: str, picture: str
    ) -> Item:
        dataset, kind = (row.get(key, str) for key in keys[:2])
        if kind not in PART_OF:
            raise DataError(f"{row.place}: unknown type of question {brief(kind)}")
        given = row.get(keys[2], (str, list))
        answers = [given] if isinstance(given, str) else row.texts(keys[2])
        question = row.get("question", str)
        truth = {"answers": answers, "dataset": dataset, "question": question, "image_id": picture}
        text = short_answer(question, self.prompts)
        return Item(f"row/{number}", text, image, truth, PART_OF[kind])

    def score(self, item: Item, text: str) -> Scored:
        said = folded(text, item.truth["dataset"])
        right = float(any(folded(a, item.truth["dataset"]) in said for a in item.truth["answers"]))
        counts = {f"asked_{item.group}": 1.0, f"right_{item.group}": right}
        return Scored(item.id, text, right, counts, item.group)

    def metrics(self, totals: Totals) -> Metrics:
        parts = {part: counts_of(totals, f"right_{part}", f"asked_{part}") for part in PARTS}
        right, asked = (sum(part[side] for part in parts.values()) for side in (0, 1))
        metrics: Metrics = {"score": ratio(right, asked)}
        return metrics | {name: ratio(*part) for name, part in parts.items()}


TASK = OcrBench()
