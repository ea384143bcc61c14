"""ScienceQA: multiple-choice science questions, about half with an image. (Lu et al., "Learn to
Explain", NeurIPS 2022)

Rule: LLaVA's llava/eval/eval_science_qa.py. `scienceqa` asks the questions that have an image (2017 of
the 4241 of the test split), `scienceqa-full` all of them. LLaVA reads pictures as stored, not as a server does
(`Task`).

Layouts read:

- official: `problems.json` and `pid_splits.json` in the directory, or in its `data/scienceqa` or
  `scienceqa`; images `{split}/{id}/image.png` beside them or in `images`;
- hub (lmms-lab/ScienceQA, derek-thomas/ScienceQA): parquet files `{split}-*.parquet`, with the columns
  image, question, choices, answer, hint; in folders `ScienceQA-IMG` and `ScienceQA-FULL` where there
  are such. The hub has no problem ids: an item's id is `row/N`, N the row counted over the files.

Several questions may be about one picture, which is there anew, under another name, for each of them. Its bytes tell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, counts_of, ratio
from vllm_flow.eval.tasks.cells import file_digest, picture_digests
from vllm_flow.eval.tasks.parquet import parquet_files, parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    brief,
    clipped,
    directory,
    few,
    first_file,
    read_json,
)

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
FOLDERS = (".", "data/scienceqa", "scienceqa")

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse_letter(text: str) -> str | None:
    """The letter an answer chooses by LLaVA's rule, or None; the text is taken as it is.

    In this order: the whole text is one of A to E; it begins with one of them, a full stop and a
    space; `The answer is X` and one more character occurs exactly once (X may be any capital).
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def question_text(question: str, choices: list[str], hint: str) -> str:
    """The user's text of LLaVA's protocol."""
    context = f"Context: {hint}\n" if hint else ""
    options = "".join(f"\n{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    return context + question + options + SUFFIX


def official_items(problems: Path, splits: Path, split: str, images: Path | None) -> list[Item]:
    """All items of a split of the official files, in the split's order."""
    known = read_json(problems, dict)
    chosen = read_json(splits, dict)
    if split not in chosen:
        raise DataError(f"{splits}: no split {split!r}; there are {few(sorted(chosen))}")
    items = []
    seen = set()
    for number in map(str, Row(str(splits), chosen).get(split, list)):
        if number not in known:
            raise DataError(
                f"{problems}: no problem {clipped(number)}, which {splits} lists under {split!r}"
            )
        if number in seen:
            raise DataError(f"{splits}: problem {clipped(number)} comes twice in {split!r}")
        seen.add(number)
        if not isinstance(known[number], dict):
            raise DataError(f"{problems}, problem {clipped(number)}: not an object")
        row = Row(f"{problems}, problem {clipped(number)}", known[number])
        name = row.get("image", str) if row.values.get("image") else None
        place = (images or Path()) / split / number / name if name else None
        picture = file_digest(place) if place and images else None
        items.append(_item(row, number, str(place) if place else None, picture))
    return items


@dataclass(frozen=True)
class ScienceQA(Task):
    """ScienceQA; by default the questions with an image."""

    name: str = "scienceqa"
    split: str = "test"
    images_only: bool = True

    max_tokens = 1024
    headline = "img_accuracy"
    unclear = (
        "name no letter in a form that the official rule reads (`B`, `B. ...`, `The answer is B.`) and count "
        "as wrong"
    )

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        problems = first_file(data, "problems.json", FOLDERS)
        if problems is not None:
            base = problems.parent
            images = image_folder(base, self.split)
            items = official_items(problems, base / "pid_splits.json", self.split, images)
        else:
            items = self._hub(data)
        return [item for item in items if item.image is not None or not self.images_only]

    def _hub(self, data: Path) -> list[Item]:
        config = "ScienceQA-IMG" if self.images_only else "ScienceQA-FULL"
        shards = f"{self.split}-*.parquet"
        files = parquet_files(data, f"{config}/{shards}", shards)
        if not files:
            raise DataError(
                f"{data}: neither problems.json (here or in {', '.join(FOLDERS[1:])}) nor {shards}"
            )
        if not self.images_only and any("ScienceQA-IMG" in path.parts for path in files):
            raise DataError(
                f"{data}: only ScienceQA-IMG is here, and {self.name} needs ScienceQA-FULL"
            )
        items: list[Item] = []
        for path in files:
            rows = parquet_rows(path, ("question", "choices", "answer"), ("hint",))
            digests = picture_digests(path)
            for number, (row, picture) in enumerate(zip(rows, digests, strict=True)):
                image = parquet_image(path, number) if picture else None
                items.append(_item(row, f"row/{len(items)}", image, picture))
        return items

    def score(self, item: Item, text: str) -> Scored:
        letter = parse_letter(text)
        right = letter == item.truth["answer"]
        return Scored(item.id, letter, float(right), _counts(item, right), unclear=letter is None)

    def metrics(self, totals: Totals) -> Metrics:
        return {
            "accuracy": ratio(*counts_of(totals, "right", "asked")),
            "img_accuracy": ratio(*counts_of(totals, "img_right", "img_answered")),
        }


def only_pictures(data: Path, split: str) -> bool:
    """Whether there are the hub's questions with a picture and no others."""
    shards = f"{split}-*.parquet"
    full, pictures = (parquet_files(data, f"ScienceQA-{part}/{shards}") for part in ("FULL", "IMG"))
    return bool(pictures) and not full and first_file(data, "problems.json", FOLDERS) is None


def unanswered(item: Item) -> Scored:
    """A question without an answer is wrong, and no part of the IMG accuracy."""
    return Scored(item.id, None, 0.0, {"asked": 1.0})


def image_folder(base: Path, split: str) -> Path:
    """Where the folder of a split's images is; `images` where there is none."""
    return next((base / f for f in ("images", ".") if (base / f / split).is_dir()), base / "images")


def _counts(item: Item, right: bool) -> dict[str, float]:
    counts = {"asked": 1.0, "right": float(right)}
    if item.truth["has_image"]:
        counts |= {"img_answered": 1.0, "img_right": float(right)}
    return counts


def _item(row: Row, number: str, image: str | None, picture: str | None = None) -> Item:
    choices: list[Any] = row.get("choices", list)
    answer = row.get("answer", int)
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise DataError(
            f"{row.place}: answer {brief(answer)} of {counted(len(choices), 'choice')} (at most {len(LETTERS)})"
        )
    text = question_text(
        row.get("question", str),
        list(map(str, choices)),
        row.get("hint", str) if row.values.get("hint") else "",
    )
    truth = {"answer": LETTERS[answer], "has_image": image is not None}
    if picture is not None:
        truth["image_id"] = picture
    return Item(number, text, image, truth)


TASK = ScienceQA()
VARIANTS = (ScienceQA(name="scienceqa-full", images_only=False),)
