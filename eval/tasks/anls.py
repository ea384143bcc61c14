"""ANLS, the score of DocVQA and InfographicVQA: how much of the best reference an answer spells.

Rule: the Robust Reading Competition's script for InfographicVQA, as QwenLM/Qwen-VL aa00ed0 has it in
eval_mm/infographicsvqa_eval.py (average normalised Levenshtein similarity; Biten et al., ICCV 2019). To the letter:
the distance is between texts in lower case with white space folded, but it is divided by the
longer of the texts as they came, in upper case; below one half counts nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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
from vllm_flow.eval.tasks.prompts import short_answer
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    directory,
    first_directory_with,
    first_file,
    json_rows,
    read_json,
)

THRESHOLD = 0.5


def distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and replacements of single characters."""
    before = list(range(len(one) + 1))
    for row, theirs in enumerate(other, 1):
        now = [row]
        for column, ours in enumerate(one, 1):
            same = before[column - 1] + (ours != theirs)
            now.append(min(same, before[column] + 1, now[-1] + 1))
        before = now
    return before[-1]


def anls(text: str, references: Sequence[str]) -> float:
    """The similarity to the closest reference, 0 where it is below one half."""
    said = " ".join(text.lower().split())
    away = []
    for reference in references:
        length = max(len(reference.upper()), len(text.upper()))
        steps = distance(" ".join(reference.lower().split()), said)
        away.append(steps / length if length else 0.0)
    similarity = 1 - min(away)
    return similarity if similarity >= THRESHOLD else 0.0


class AnlsTask(Task):
    """A task scored by ANLS; what differs are the files."""

    prompts: str
    max_tokens = 128
    headline = "anls"
    binary = False

    questions: tuple[str, ...]
    """Names of the official file of questions."""
    hub: tuple[str, str]
    """The hub's configuration and its repository."""
    folders: tuple[str, ...]
    """Where pictures are, from the file of questions."""

    @abstractmethod
    def picture_name(self, row: Row) -> str:
        """A record's picture in the official files."""

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        there = (first_file(data, name, (".", "val", "data")) for name in self.questions)
        path = next((path for path in there if path is not None), None)
        if path is not None:
            rows = json_rows(path, Row(str(path), read_json(path, dict)).get("data", list))
            names = [self.picture_name(row) for row in rows]
            folder = first_directory_with(path.parent, names[:50], self.folders)
            return [
                self._item(row, str(folder / name), name)
                for row, name in zip(rows, names, strict=True)
            ]
        config, repository = self.hub
        files = parquet_files(data, f"{config}/validation-*.parquet", "validation-*.parquet")
        if not files:
            raise DataError(
                f"{data}: neither {' nor '.join(self.questions)} nor {config}/validation-*.parquet of "
                f"{repository}"
            )
        items: list[Item] = []
        for path in files:
            found = rows_and_pictures(path, ("questionId", "question", "answers"))
            items += [self._item(row, image, picture) for row, image, picture in found]
        return items

    def _item(self, row: Row, image: str, picture: str) -> Item:
        answers = row.texts("answers")
        if not answers:
            raise DataError(f"{row.place}: no answers; is it the validation split?")
        question = row.get("question", str)
        truth = {"answers": answers, "question": question, "image_id": picture}
        return Item(
            row.identifier("questionId"), short_answer(question, self.prompts), image, truth
        )

    def score(self, item: Item, text: str) -> Scored:
        score = anls(text, item.truth["answers"])
        return Scored(item.id, text, score, {"score": score, "answered": 1.0})

    def metrics(self, totals: Totals) -> Metrics:
        return {"anls": ratio(*counts_of(totals, "score", "answered"))}
