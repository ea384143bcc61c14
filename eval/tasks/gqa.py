"""GQA: compositional questions about real pictures. (Hudson and Manning, CVPR 2019)

Rule: GQA's eval.py (equality with the one answer, over the balanced questions) on what LLaVA's
scripts/convert_gqa_for_eval.py makes of an answer: full stops at its end go, lower case. Consistency,
validity, plausibility, grounding and distribution, which need further files, are left out.

Layouts read:

- official: `testdev_balanced_questions.json` in the directory, or its `data`, `questions`, `questions1.2`;
  pictures `{imageId}.jpg` in `images`, `data/images`, or the directory itself;
- hub (lmms-lab/GQA): `testdev_balanced_instructions/testdev-*.parquet` with the columns id, imageId,
  question, answer, types, isBalanced, and `testdev_balanced_images/testdev-*.parquet` with id, image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_flow.eval.tasks.base import (
    Item,
    Metrics,
    Scored,
    Task,
    Totals,
    accuracy_parts,
    grouped_accuracy,
)
from vllm_flow.eval.tasks.parquet import parquet_files, parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.prompts import short_answer
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    brief,
    directory,
    first_directory_with,
    first_file,
    named_rows,
    read_json,
)

QUESTIONS = "testdev_balanced_questions.json"
FOLDERS = (".", "data", "questions", "questions1.2")
IMAGE_FOLDERS = ("images", "data/images", ".", "../images")
GROUPS = ("binary", "open")


def parse(text: str) -> str:
    """What is compared with the answer."""
    return text.rstrip(".").lower()


@dataclass(frozen=True)
class Gqa(Task):
    """GQA's balanced test-dev split. An item's group is `open` (structural type `query`) or `binary`."""

    name = "gqa"
    prompts: str = "llava"

    max_tokens = 128
    headline = "accuracy"
    parts = accuracy_parts(GROUPS)

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        questions = first_file(data, QUESTIONS, FOLDERS)
        if questions is not None:
            rows = named_rows(questions, read_json(questions, dict), "question")
            names = [f"{row.identifier('imageId')}.jpg" for _, row in rows]
            folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
            images = {name[:-4]: str(folder / name) for name in names}
        else:
            files = parquet_files(data, "testdev_balanced_instructions/testdev-*.parquet")
            if not files:
                raise DataError(
                    f"{data}: neither {QUESTIONS} (here or in {', '.join(FOLDERS[1:])}) nor "
                    "testdev_balanced_instructions/testdev-*.parquet of lmms-lab/GQA"
                )
            columns = ("id", "imageId", "question", "answer", "types", "isBalanced")
            found = [row for path in files for row in parquet_rows(path, columns)]
            rows = [(row.identifier("id"), row) for row in found]
            images = _hub_images(data)
        return list(self._items(rows, images))

    def _items(self, rows: list[tuple[str, Row]], images: dict[str, str]) -> Iterable[Item]:
        for number, row in rows:
            if not row.values.get("isBalanced", True):
                continue
            image = row.identifier("imageId")
            if image not in images:
                raise DataError(f"{row.place}: no picture {brief(image)} among the files")
            types = row.get("types", dict)
            group = "open" if types.get("structural") == "query" else "binary"
            question = row.get("question", str)
            truth = {"answer": row.get("answer", str), "question": question, "image_id": image}
            yield Item(number, short_answer(question, self.prompts), images[image], truth, group)

    def score(self, item: Item, text: str) -> Scored:
        said = parse(text)
        right = float(said == item.truth["answer"])
        counts = {f"asked_{item.group}": 1.0, f"right_{item.group}": right}
        return Scored(item.id, said, right, counts, item.group)

    def metrics(self, totals: Totals) -> Metrics:
        return grouped_accuracy(totals, GROUPS)


def _hub_images(data: Path) -> dict[str, str]:
    files = parquet_files(data, "testdev_balanced_images/testdev-*.parquet")
    if not files:
        raise DataError(f"{data}: no testdev_balanced_images/testdev-*.parquet of lmms-lab/GQA")
    return {
        row.identifier("id"): parquet_image(path, number)
        for path in files
        for number, row in enumerate(parquet_rows(path, ("id",)))
    }


TASK = Gqa()
