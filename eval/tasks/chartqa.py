"""ChartQA: questions about charts, written by people and generated. (Masry et al., Findings of ACL 2022)

Rule: the paper's relaxed accuracy as published in google-research/pix2struct, metrics.py: numbers may be 5 % of
the target's size away, anything else must be the target, case aside. (Qwen-VL's script, which lent
many harnesses this code, calls it with answer and target swapped; here 5 % are of the target.)

Layouts read:

- official (vis-nlp/ChartQA): `test_human.json` and `test_augmented.json` (imgname, query, label) in the
  directory, or its `test`, `ChartQA Dataset/test`; pictures in `png` beside them;
- hub (lmms-lab/ChartQA): `test-*.parquet` with the columns type, question, answer, image.
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
    accuracy_parts,
    grouped_accuracy,
)
from vllm_flow.eval.tasks.cells import rows_and_pictures
from vllm_flow.eval.tasks.parquet import parquet_files
from vllm_flow.eval.tasks.prompts import short_answer
from vllm_flow.eval.tasks.reading import DataError, brief, directory, json_rows, read_json

GROUPS = ("human", "augmented")
FOLDERS = (".", "test", "ChartQA Dataset/test")
WORD = "\nAnswer the question with a single word."
"""LLaVA-NeXT's, as lmms-eval 0.7.3 has it; LLaVA-1.5 published none."""
TOLERANCE = 0.05


def number_of(text: str) -> float | None:
    """A number as the rule reads it: what Python's float() takes, a per cent sign at the end dividing by 100."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_correct(text: str, target: str) -> bool:
    """Within 5 % of a number that is not zero; else equal, case aside. So `0.0` is not `0`."""
    given, wanted = number_of(text), number_of(target)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= TOLERANCE
    return text.lower() == target.lower()


@dataclass(frozen=True)
class ChartQA(Task):
    """ChartQA's test split. An item's group is `human` or `augmented`."""

    name = "chartqa"
    prompts: str = "llava"

    max_tokens = 128
    headline = "accuracy"
    parts = accuracy_parts(GROUPS)

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        for folder in (data / name for name in FOLDERS):
            paths = {group: folder / f"test_{group}.json" for group in GROUPS}
            found = {group: path for group, path in paths.items() if path.is_file()}
            if found:
                return [
                    item for group, path in found.items() for item in self._official(path, group)
                ]
        files = parquet_files(data, "test-*.parquet")
        if not files:
            raise DataError(
                f"{data}: neither test_human.json and test_augmented.json (here or in "
                f"{', '.join(FOLDERS[1:])}) nor test-*.parquet of lmms-lab/ChartQA"
            )
        items: list[Item] = []
        for path in files:
            for row, image, picture in rows_and_pictures(path, ("type", "question", "answer")):
                group = row.get("type", str).removesuffix("_test")
                if group not in GROUPS:
                    raise DataError(f"{row.place}: unknown type {brief(row.values['type'])}")
                name = f"row/{len(items)}"
                texts = (row.get("question", str), row.get("answer", str))
                items.append(self._item(name, group, *texts, image, picture))
        return items

    def _official(self, path: Path, group: str) -> list[Item]:
        return [
            self._item(
                f"{group}/{number}", group, row.get("query", str), row.get("label", str),
                str(path.parent / "png" / row.get("imgname", str)), row.get("imgname", str),
            )
            for number, row in enumerate(json_rows(path, read_json(path, list)))
        ]  # fmt: skip

    def _item(
        self, name: str, group: str, question: str, answer: str, image: str, picture: str
    ) -> Item:
        text = question + WORD if self.prompts == "llava" else short_answer(question, self.prompts)
        truth = {"answer": answer, "question": question, "image_id": picture}
        return Item(name, text, image, truth, group)

    def score(self, item: Item, text: str) -> Scored:
        right = float(relaxed_correct(text, item.truth["answer"]))
        counts = {f"asked_{item.group}": 1.0, f"right_{item.group}": right}
        return Scored(item.id, text, right, counts, item.group)

    def metrics(self, totals: Totals) -> Metrics:
        return grouped_accuracy(totals, GROUPS)


TASK = ChartQA()
