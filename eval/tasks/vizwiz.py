"""VizWiz-VQA: questions that blind people asked about their photographs. (Gurari et al., CVPR 2018)

Rule: the challenge's VQAEval (Q. Li's VizWiz API): leave-one-out soft accuracy over ten annotators. It differs
from TextVQA's: the annotators' answers are taken as they stand, capitals and `'s` are left alone until the
end, a number with a comma in it makes every mark vanish, and its table writes contractions with a
typographic apostrophe, so that `dont` never matches. Prompts: LLaVA's. Answerability, and scores per type
on the hub's files, which do not know the type, are left out.

Layouts read:

- official: `val.json` in the directory or its `Annotations`, pictures in `val`, `images` or beside it;
- hub (lmms-lab/VizWiz-VQA): `val-*.parquet` with the columns question_id, question, answers, image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
from vllm_flow.eval.tasks.textvqa import (
    ARTICLES,
    MARKS,
    NUMBERS,
    PERIOD,
    PERIODS_REMOVED,
)
from vllm_flow.eval.tasks.textvqa import CONTRACTIONS as STRAIGHT

INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
IMAGE_FOLDERS = ("val", "../val", "images", ".", "../images")
TYPES = ("yes/no", "number", "other", "unanswerable")
COMMA = re.compile(r"\d,\d")
STRAIGHT_VALUES = ("aint", "arent", "cant", "couldve", "weve", "wheres", "whove", "couldnt")
STRAIGHT_KEYS = ("couldn'tve", "hadn'tve")


def _contractions() -> Mapping[str, str]:
    """The table of the VQA evaluation as VizWiz prints it: most apostrophes are typographic."""
    table = {}
    for key, value in STRAIGHT.items():
        kept = key in STRAIGHT_VALUES
        table[key if key in STRAIGHT_KEYS else key.replace("'", "’")] = (
            value if kept else value.replace("'", "’")
        )
    return table


CONTRACTIONS = _contractions()


def normalise(text: str) -> str:
    """An answer as the official evaluation compares it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number = COMMA.search(text) is not None
    kept = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space or number else " ")
    kept = PERIOD.sub("", kept, count=PERIODS_REMOVED)
    words = [NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(text: str, answers: Sequence[str]) -> float:
    """The mean, over the annotators, of min(1, matches among the others / 3)."""
    matches = [answer == normalise(text) for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def metric_name(kind: str) -> str:
    """The metric of a type of answer: `accuracy_yes_no`."""
    return "accuracy_" + kind.replace("/", "_")


@dataclass(frozen=True)
class VizWiz(Task):
    """VizWiz-VQA's validation split. An item's group is its type of answer, where the file tells it."""

    name = "vizwiz"
    prompts: str = "llava"

    max_tokens = 128
    headline = "accuracy"
    parts = MappingProxyType({metric_name(kind): (kind,) for kind in TYPES})
    binary = False

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        path = first_file(data, "val.json", (".", "Annotations", "annotations"))
        if path is not None:
            rows = json_rows(path, read_json(path, list))
            names = [row.get("image", str) for row in rows]
            folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
            return [
                self._item(row, name, str(folder / name), name)
                for row, name in zip(rows, names, strict=True)
            ]
        files = parquet_files(data, "val-*.parquet")
        if not files:
            raise DataError(f"{data}: neither val.json nor val-*.parquet of lmms-lab/VizWiz-VQA")
        items = []
        columns = ("question_id", "question", "answers")
        for file in files:
            for row, image, picture in rows_and_pictures(file, columns):
                items.append(self._item(row, row.identifier("question_id"), image, picture))
        return items

    def _item(self, row: Row, name: str, image: str, picture: str) -> Item:
        given = row.get("answers", list)
        answers = [one.get("answer") if isinstance(one, dict) else one for one in given]
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{row.place}: no list of answers; is it the validation split?")
        kind = row.values.get("answer_type", "")
        if kind and kind not in TYPES:
            raise DataError(f"{row.place}: unknown type of answer {brief(kind)}")
        question = row.get("question", str)
        truth = {"answers": answers, "question": question, "image_id": picture}
        text = question + INSUFFICIENT if self.prompts == "llava" else question
        return Item(name, short_answer(text, self.prompts), image, truth, kind)

    def score(self, item: Item, text: str) -> Scored:
        score = soft_accuracy(text, item.truth["answers"])
        counts = {f"score_{item.group}": score, f"answered_{item.group}": 1.0}
        return Scored(item.id, normalise(text), score, counts, item.group)

    def metrics(self, totals: Totals) -> Metrics:
        parts = {
            kind: counts_of(totals, f"score_{kind}", f"answered_{kind}") for kind in ("", *TYPES)
        }
        score, answered = (sum(part[side] for part in parts.values()) for side in (0, 1))
        metrics: Metrics = {"accuracy": ratio(score, answered)}
        return metrics | {metric_name(kind): ratio(*parts[kind]) for kind in TYPES}


TASK = VizWiz()
