"""Joins answer files, in LLaVA's formats, with a benchmark's questions; refuses what does not fit.

An answer is a record `{"question_id", "prompt", "text", ...}`, a caption `{"image_id", "caption"}`. A
wrong join gives plausible, wrong scores, so every join is checked with all that the records say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from vllm_flow.eval.tasks.base import Item
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    brief,
    by_unique,
    few,
)


class Answer(NamedTuple):
    """An item with the answer to it; None where there is none."""

    item: Item
    text: str | None


def scienceqa_answers(items: Sequence[Item], rows: Sequence[Row]) -> list[Answer]:
    """By problem id. Where a record tells its prompt, `<image>` in it says whether the model saw one."""
    known = {item.id: item for item in items}
    answers = by_unique(((row.identifier("question_id"), row) for row in rows), "the answer to")
    _refuse_unknown(answers, known, "problem ids that are not in this split")
    joined = []
    for item in items:
        row = answers.get(item.id)
        if row is None:
            joined.append(Answer(item, None))
            continue
        if "prompt" in row.values:
            seen = "<image>" in row.get("prompt", str)
            item = replace(item, truth={**item.truth, "has_image": seen})
        joined.append(Answer(item, row.get("text", str)))
    return joined


def textvqa_answers(items: Sequence[Item], rows: Sequence[Row]) -> list[Answer]:
    """By image id and lower-cased question, as LLaVA's answers have them; only the answered items.

    Records without a prompt are joined by TextVQA's own question ids.
    """
    known: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        known.setdefault((item.truth["image_id"], item.truth["question"].lower()), []).append(item)
    by_id = {item.id: item for item in items}
    answered: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Row] = {}
    joined, unknown = [], []
    for row in rows:
        number = row.identifier("question_id")
        if "prompt" in row.values:
            key = (number, question_of(row.get("prompt", str)).lower())
        elif number in by_id:
            key = (by_id[number].truth["image_id"], by_id[number].truth["question"].lower())
        else:
            raise DataError(
                f"{row.place}: no 'prompt', and {number} is none of TextVQA's question ids; LLaVA's "
                "answers give the image's id as question_id and the question in the prompt"
            )
        same = known.get(key)
        if same is None:
            unknown.append(row)
            continue
        if answered[key] == len(same):
            raise DataError(
                f"{row.place}: a second answer to {brief(key[1])} on image {key[0]} "
                f"(first: {first[key].place})"
            )
        first.setdefault(key, row)
        # Two annotations of one image and question: the official table keeps the last one's answers.
        item = replace(same[answered[key]], truth=same[-1].truth)
        answered[key] += 1
        joined.append(Answer(item, row.get("text", str)))
    if unknown:
        shown = few(f"{row.place} ({row.identifier('question_id')})" for row in unknown)
        raise DataError(
            f"answers to no question of the annotations: {len(unknown)} of {len(rows)} "
            f"(image id and question must both fit): {shown}"
        )
    return joined


def question_of(prompt: str) -> str:
    """The question in a prompt of one of LLaVA's TextVQA formats."""
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if match:
            return match[1]
    lines = prompt.removeprefix("<image>\n").split("\n")
    return lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]


def captions_by_image(rows: Sequence[Row]) -> dict[int, str]:
    """Captions under their image ids, in the file's order."""
    keyed = ((row.number("image_id", "a COCO image id"), row) for row in rows)
    found = by_unique(keyed, "the caption of image")
    return {image: row.get("caption", str) for image, row in found.items()}


def _refuse_unknown(answers: Mapping[str, Row], known: Iterable[str], what: str) -> None:
    names = set(known)
    unknown = [number for number in answers if number not in names]
    if unknown:
        raise DataError(
            f"answers with {what}, {len(unknown)} of {len(answers)}: {few(unknown)} "
            f"({answers[unknown[0]].place})"
        )
