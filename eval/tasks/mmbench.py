"""MMBench: multiple choice, each question asked once per rotation of its options. (Liu et al., ECCV 2024)

Rule: circular evaluation of open-compass/VLMEvalKit e8e78f05 (vlmeval/dataset/utils/multiple_choice.py) under
its policy `exact_matching`: an option is read off the answer by choices.py, and a question counts if every rotation of
it is right. What needs the judge model (answers that name no option) counts as wrong, which is a lower bound
of the official score. `accuracy_passes` is the share of right answers, rotations counted one by one.
Prompts: LLaVA's, hint, question, options, on lines of their own.

Layouts read:

- official: `mmbench_dev_20230712.tsv`, or any other `*mmbench*.tsv` (index, question, hint, A to D, answer,
  l2-category, image in base64; rotations have an index 1000000 higher each);
- hub (lmms-lab/MMBench): `en/dev-*.parquet` or `dev-*.parquet` with the same columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from vllm_flow.counts import counted
from vllm_flow.eval.tasks.base import (
    Item,
    Metrics,
    Scored,
    Task,
    Totals,
    counts_of,
    ratio,
    whole_bundles,
    with_counts,
)
from vllm_flow.eval.tasks.cells import Cell, digest, rows_and_pictures, tsv_rows
from vllm_flow.eval.tasks.choices import infer
from vllm_flow.eval.tasks.parquet import parquet_files
from vllm_flow.eval.tasks.pictures import encoded_image
from vllm_flow.eval.tasks.prompts import choose
from vllm_flow.eval.tasks.reading import DataError, Row, brief, directory

ROTATION = 1_000_000
LETTERS = "ABCD"
ABILITIES = (
    "attribute_reasoning", "coarse_perception", "finegrained_perception (cross-instance)",
    "finegrained_perception (instance-level)", "logic_reasoning", "relation_reasoning",
)  # fmt: skip
REFERENCE = 64
"""An image's text that is shorter is the index of the row that has the picture."""


def is_none(value: object) -> bool:
    """Whether a cell is empty, as LLaVA's script takes it."""
    return value is None or str(value).lower() in ("nan", "none")


def metric_name(ability: str) -> str:
    """An ability's metric: `accuracy_finegrained_perception_cross_instance`."""
    return "accuracy_" + re.sub(r"[ -]", "_", re.sub(r"[()]", "", ability))


@dataclass(frozen=True)
class MMBench(Task):
    """MMBench's English development split. An item is a rotation; its group is the ability tested."""

    name = "mmbench"
    prompts: str = "llava"

    max_tokens = 1024
    headline = "accuracy"
    parts = MappingProxyType({metric_name(ability): (ability,) for ability in ABILITIES})
    unclear = (
        "name no option that the rule-based part of the official matching finds; a judge model would be asked, "
        "here they count as wrong"
    )

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        tables = sorted(path for path in data.glob("*.tsv") if "mmbench" in path.name.lower())
        if len(tables) > 1:
            raise DataError(
                f"{data}: {tables[0].name} and {tables[1].name}; keep the one to be asked"
            )
        items = list(self._official(tables[0]) if tables else self._hub(data))
        sizes = Counter(item.truth["question_id"] for item in items)
        return [
            replace(item, truth={**item.truth, "rotations": sizes[item.truth["question_id"]]})
            for item in items
        ]

    def _official(self, path: Path) -> Iterator[Item]:
        cells: dict[str, tuple[str, str]] = {}
        for row, cell in tsv_rows(path, "image"):
            index = row.identifier("index")
            text = row.get("image", str)
            if len(text) > REFERENCE:
                cells[index] = (encoded_image(path, *Cell(*cell)), digest(text.encode()))
            elif text not in cells:
                raise DataError(
                    f"{row.place}: the picture is that of row {text}, which is not above"
                )
            yield self._item(row, *cells[index if len(text) > REFERENCE else text], "l2-category")

    def _hub(self, data: Path) -> Iterator[Item]:
        files = parquet_files(data, "en/dev-*.parquet", "dev-*.parquet")
        if not files:
            raise DataError(
                f"{data}: neither an *mmbench*.tsv nor dev-*.parquet of lmms-lab/MMBench"
            )
        columns = ("index", "question", "hint", "answer", *LETTERS, "L2-category")
        for path in files:
            for row, image, picture in rows_and_pictures(path, columns):
                yield self._item(row, image, picture, "L2-category")

    def _item(self, row: Row, image: str, picture: str, category: str) -> Item:
        index = row.number("index", "an index")
        options: dict[str, str] = {}
        for letter in LETTERS:
            if is_none(row.values.get(letter)):
                break
            options[letter] = str(row.values[letter])
        answer, group = row.get("answer", str), str(row.values.get(category) or "")
        if answer not in options:
            raise DataError(
                f"{row.place}: the answer {brief(answer)} is not one of the {counted(len(options), 'option')}"
            )
        hint = "" if is_none(row.values.get("hint")) else str(row.values["hint"])
        question = row.get("question", str)
        text = choose(question, list(options.values()), hint, self.prompts)
        truth = {
            "answer": answer, "options": options, "question": question,
            "question_id": str(index % ROTATION), "image_id": picture,
        }  # fmt: skip
        return Item(str(index), text, image, truth, group if group in ABILITIES else "")

    def bundle(self, item: Item) -> tuple[str, int]:
        return (item.truth["question_id"], item.truth["rotations"])

    def score(self, item: Item, text: str) -> Scored:
        said = infer(text, item.truth["options"])
        right = float(said == item.truth["answer"])
        counts = {"passes": 1.0, "passes_right": right}
        return Scored(item.id, said, right, counts, item.group, said is None, self.bundle(item))

    def together(self, scored: Iterable[Scored]) -> list[Scored]:
        scored = list(scored)
        hits = {}
        for parts in whole_bundles(scored):
            group, hit = parts[0].group, float(all(part.score == 1 for part in parts))
            hits[parts[0].id] = {f"asked_{group}": 1.0, f"right_{group}": hit}
        return with_counts(scored, hits)

    def metrics(self, totals: Totals) -> Metrics:
        parts = {
            name: counts_of(totals, f"right_{name}", f"asked_{name}") for name in ("", *ABILITIES)
        }
        right, asked = (sum(part[side] for part in parts.values()) for side in (0, 1))
        metrics: Metrics = {
            "accuracy": ratio(right, asked),
            "accuracy_passes": ratio(*counts_of(totals, "passes_right", "passes")),
        }
        return metrics | {metric_name(name): ratio(*parts[name]) for name in ABILITIES}


TASK = MMBench()
