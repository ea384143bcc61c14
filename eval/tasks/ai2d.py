"""AI2D: multiple-choice questions about science diagrams. (Kembhavi et al., ECCV 2016)

Rule: lmms-eval 0.7.3, tasks/ai2d, with which LLaVA-NeXT's scores were obtained (the benchmark has no script of its
own): a capital and a full stop at the beginning choose that letter; the rest is compared with the letter as it
stands, case and ASCII punctuation aside. So `(b)` is B, and `B cat` wrong.

Layouts read:

- official (ai2d-all): `questions/*.json`, the test split's `ai2d_test_ids.csv`, pictures in `images`, and in
  `abc_images` for questions about letters that stand in place of the labels;
- hub (lmms-lab/ai2d): `test-*.parquet` with the columns question, options, answer (the option's number), image.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_flow.counts import counted
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
from vllm_flow.eval.tasks.prompts import choose
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    brief,
    directory,
    named_rows,
    read_json,
    read_text,
)

IDS = "ai2d_test_ids.csv"
LONGEST = 100
"""Characters of a picture's number; there are five."""
FIRST = re.compile(r"\s*([A-Z])\.")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def parse_letter(text: str) -> str:
    """What is compared with the letter, in lower case."""
    found = FIRST.match(text)
    return (found[1] if found else text).lower().translate(PUNCTUATION)


@dataclass(frozen=True)
class Ai2d(Task):
    """AI2D's test split."""

    name = "ai2d"
    prompts: str = "llava"

    max_tokens = 128
    headline = "accuracy"
    unclear = (
        "are no letter in a form that the rule reads (`B`, `B. ...`, `(b)`) and count as wrong"
    )

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        for folder in (data, data / "ai2d"):
            if (folder / "questions").is_dir():
                return list(self._official(folder))
        files = parquet_files(data, "test-*.parquet")
        if not files:
            raise DataError(
                f"{data}: neither questions/*.json and {IDS} nor test-*.parquet of lmms-lab/ai2d"
            )
        items: list[Item] = []
        for path in files:
            for row, image, picture in rows_and_pictures(path, ("question", "options", "answer")):
                at = row.number("answer", "an option's number")
                question, options = row.get("question", str), row.texts("options")
                name = f"row/{len(items)}"
                items.append(self._item(row, name, question, options, at, image, picture))
        return items

    def _official(self, folder: Path) -> Iterator[Item]:
        path = next((p for p in (folder / IDS, folder.parent / IDS) if p.is_file()), folder / IDS)
        for name in sorted(filter(None, map(str.strip, read_text(path).splitlines()))):
            if len(name) > LONGEST:
                raise DataError(f"{path}: {brief(name)} is no picture's number")
            file = folder / "questions" / f"{name}.png.json"
            content = Row(str(file), read_json(file, dict))
            picture = content.get("imageName", str)
            for question, row in named_rows(file, content.get("questions", dict), "question"):
                kind = "abc_images" if row.values.get("abcLabel") else "images"
                image = str(folder / kind / picture)
                yield self._item(
                    row, row.get("questionId", str), question, row.texts("answerTexts"),
                    row.get("correctAnswer", int), image, f"{kind}/{picture}",
                )  # fmt: skip

    def _item(
        self,
        row: Row,
        name: str,
        question: str,
        options: Sequence[str],
        at: int,
        image: str,
        picture: str,
    ) -> Item:
        if not 0 <= at < len(options) <= 26:
            raise DataError(f"{row.place}: answer {brief(at)} of {counted(len(options), 'option')}")
        truth = {"answer": chr(ord("A") + at), "question": question, "image_id": picture}
        return Item(name, choose(question, options, style=self.prompts), image, truth)

    def score(self, item: Item, text: str) -> Scored:
        said = parse_letter(text)
        right = float(said == item.truth["answer"].lower())
        counts = {"asked": 1.0, "right": right}
        return Scored(item.id, said, right, counts, unclear=len(said) != 1)

    def metrics(self, totals: Totals) -> Metrics:
        return {"accuracy": ratio(*counts_of(totals, "right", "asked"))}


TASK = Ai2d()
