"""RealWorldQA: questions about photographs, many from cars; letters, words and numbers as answers. (xAI, 2024)

Rule: xAI published none. Here the exact match that lmms-eval had (tasks/realworldqa, before it began to look
for a letter anywhere in the answer): case, outer white space and full stops at the end aside. The questions
say themselves how to answer, and nothing is added.

Layouts read: official, `annotations.jsonl` (image, question, answer) beside the pictures; hub
(xai-org/RealworldQA, lmms-lab/RealWorldQA), `test-*.parquet` with the columns question, answer, image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
from vllm_flow.eval.tasks.reading import DataError, Row, directory, first_file, read_records


def parse(text: str) -> str:
    """What is compared with the answer."""
    return text.lower().strip().rstrip(".")


@dataclass(frozen=True)
class RealWorldQA(Task):
    """RealWorldQA's 765 questions."""

    name = "realworldqa"

    max_tokens = 128
    headline = "accuracy"

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        path = first_file(data, "annotations.jsonl", (".", "realworldqa"))
        if path is not None:
            rows = read_records(path, "questions")
            names = [row.get("image", str) for row in rows]
            images = [str(path.parent / name) for name in names]
            found = iter(list(zip(rows, images, names, strict=True)))
        else:
            files = parquet_files(data, "test-*.parquet")
            if not files:
                raise DataError(
                    f"{data}: neither annotations.jsonl nor test-*.parquet of xai-org/RealworldQA"
                )
            found = (
                one for file in files for one in rows_and_pictures(file, ("question", "answer"))
            )
        return [_item(row, n, image, name) for n, (row, image, name) in enumerate(found)]

    def score(self, item: Item, text: str) -> Scored:
        said = parse(text)
        right = float(said == item.truth["answer"].strip().lower())
        return Scored(item.id, said, right, {"asked": 1.0, "right": right})

    def metrics(self, totals: Totals) -> Metrics:
        return {"accuracy": ratio(*counts_of(totals, "right", "asked"))}


def _item(row: Row, number: int, image: str, picture: str) -> Item:
    question = row.get("question", str)
    truth = {"answer": row.get("answer", str), "question": question, "image_id": picture}
    return Item(f"row/{number}", question.strip(), image, truth)


TASK = RealWorldQA()
