"""TextVQA: questions that need the text in the image to be read. (Singh et al., CVPR 2019)

Rule: LLaVA's llava/eval/eval_textvqa.py and m4c_evaluator.py (from MMF), that is the VQA evaluation with
leave-one-out soft accuracy. `textvqa` gives the model OCR tokens, as LLaVA does; `textvqa-no-ocr` does
not. LLaVA reads pictures as stored, not as a server does (`Task`).

Layouts read:

- official: `TextVQA_0.5.1_val.json` in the directory; OCR tokens `TextVQA_Rosetta_OCR_v0.2_val.json`
  beside it, unless the records carry `ocr_tokens`; images `{image_id}.jpg` in `train_images`,
  `train_val_images/train_images`, `images`, or the directory itself;
- hub (lmms-lab/textvqa): parquet files `validation-*.parquet` with the columns image_id, question_id,
  question, answers, image, ocr_tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_flow.counts import counted
from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, counts_of, ratio
from vllm_flow.eval.tasks.parquet import parquet_files, parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    by_unique,
    directory,
    first_directory_with,
    json_rows,
    read_json,
)

ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
SUFFIX = "\nAnswer the question using a single word or phrase."
OCR_LINE = "\nReference OCR token: "
IMAGE_FOLDERS = ("train_images", "train_val_images/train_images", "images", ".")
ANSWERS = 10
"""Annotators per question; the rule is defined for ten."""

MARKS = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32
"""The official code passes a flag (re.UNICODE, 32) where `re.sub` takes the number of replacements."""
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}


CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""
CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in CONTRACTED.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
"""The VQA evaluation's contractions: a word that lacks one of its apostrophes -> the word. The last
entry stands so in the official table; its entries with capitals never meet lower-cased text."""


def normalise(text: str) -> str:
    """An answer as the official evaluation compares it.

    >>> normalise("The  Two-door car's, no. 5.5")
    "2 door car 's no 5.5"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    kept = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space else " ")
    kept = PERIOD.sub("", kept, count=PERIODS_REMOVED)
    words = [NUMBERS.get(word, word) for word in kept.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(text: str, answers: Sequence[str]) -> float:
    """Leave-one-out accuracy: the mean, over the annotators, of min(1, matches among the others / 3).

    0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, >= 4 matches among ten.
    """
    given = normalise(text)
    matches = [normalise(answer) == given for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def question_text(question: str, ocr_tokens: Iterable[str] | None) -> str:
    """The user's text of LLaVA's protocol; without a line of OCR tokens where they are None."""
    ocr = "" if ocr_tokens is None else OCR_LINE + ", ".join(ocr_tokens)
    return question.capitalize() + ocr + SUFFIX


@dataclass(frozen=True)
class TextVQA(Task):
    """TextVQA's validation split, with or without OCR tokens in the prompt."""

    name: str = "textvqa"
    ocr: bool = True

    max_tokens = 128
    headline = "accuracy"
    binary = False

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        if (data / ANNOTATIONS).is_file():
            return self._official(data)
        files = parquet_files(data, "validation-*.parquet")
        if not files:
            raise DataError(f"{data}: neither {ANNOTATIONS} nor validation-*.parquet")
        items = []
        columns = ("image_id", "question_id", "question", "answers")
        for path in files:
            rows = parquet_rows(path, (*columns, "ocr_tokens") if self.ocr else columns)
            for number, row in enumerate(rows):
                tokens = row.texts("ocr_tokens", optional=True) if self.ocr else None
                items.append(item(row, parquet_image(path, number), tokens))
        return items

    def _official(self, data: Path) -> list[Item]:
        rows = annotation_rows(data / ANNOTATIONS)
        tokens = self._tokens(data, rows) if self.ocr else None
        names = [f"{row.identifier('image_id')}.jpg" for row in rows]
        folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
        return [
            item(row, str(folder / name), None if tokens is None else tokens.get(name[:-4], []))
            for row, name in zip(rows, names, strict=True)
        ]

    def _tokens(self, data: Path, rows: list[Row]) -> dict[str, list[str]]:
        """OCR tokens by image id; an image that is not listed has none."""
        if all("ocr_tokens" in row.values for row in rows):
            return {
                row.identifier("image_id"): row.texts("ocr_tokens", optional=True) for row in rows
            }
        if not (data / OCR).is_file():
            raise DataError(
                f"{data / OCR}: no such file, and {ANNOTATIONS} has no ocr_tokens: "
                "get it from textvqa.org, or use textvqa-no-ocr"
            )
        tokens = {
            row.identifier("image_id"): row.texts("ocr_tokens", optional=True)
            for row in json_rows(data / OCR, _records(data / OCR))
        }
        if not any(row.identifier("image_id") in tokens for row in rows):
            raise DataError(f"{data / OCR}: has no image of {ANNOTATIONS}; is it of another split?")
        return tokens

    def score(self, item: Item, text: str) -> Scored:
        score = soft_accuracy(text, item.truth["answers"])
        return Scored(item.id, normalise(text), score, {"score": score, "answered": 1.0})

    def metrics(self, totals: Totals) -> Metrics:
        return {"accuracy": ratio(*counts_of(totals, "score", "answered"))}


def _records(path: Path) -> list[object]:
    content = Row(str(path), read_json(path, dict))
    records: list[object] = content.get("data", list)
    return records


def annotation_rows(path: Path) -> list[Row]:
    """The questions of an annotation file, each with an id of its own."""
    rows = json_rows(path, _records(path))
    if not rows:
        raise DataError(f"{path}: no questions in it")
    by_unique(((row.identifier("question_id"), row) for row in rows), "question id")
    return rows


def item(row: Row, image: str | None, tokens: Iterable[str] | None) -> Item:
    """The item of an annotation; `tokens` None leaves the OCR line out."""
    question, answers = row.get("question", str), row.get("answers", list)
    if len(answers) != ANSWERS or not all(isinstance(answer, str) for answer in answers):
        raise DataError(
            f"{row.place}: {counted(len(answers), 'answer')}; the rule needs {ANSWERS} texts"
        )
    truth = {"answers": answers, "question": question, "image_id": row.identifier("image_id")}
    text = question_text(question, tokens)
    return Item(row.identifier("question_id"), text, image, truth)


TASK = TextVQA()
VARIANTS = (TextVQA(name="textvqa-no-ocr", ocr=False),)
