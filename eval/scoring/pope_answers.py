"""Joins POPE answers with the three label files; refuses what does not fit.

Every label file counts its questions from 1, LLaVA's one answer file holds all three categories, and
the random category exists with 2910 and with 3000 questions, so a join by position or by id alone can
go wrong without a trace. Here an answer's category comes from a field, from the question file, or from
the order of the blocks; its question from its id or from its place; and whatever else the record says
(question text, image) must agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations

from vllm_flow.counts import counted
from vllm_flow.eval.scoring.answer_files import Answer
from vllm_flow.eval.tasks.base import Item
from vllm_flow.eval.tasks.reading import DataError, Row, brief, by_unique, few

OBJECT = re.compile(r"is there an? (.+?) in the im\w*", re.IGNORECASE)
"""What a question asks about. Some of the published questions end in `imange`."""


VERSIONS = (
    " COCO's random category has 2910 questions in the version LLaVA used and 3000 in today's: take the "
    "label files that the questions came from."
)


class Record:
    """An answer with what is known of its question."""

    def __init__(
        self, row: Row, category: str | None, question: Row | None, order: int = 0
    ) -> None:
        self.row = row
        self.order = order
        """Its question's place in the question file; its own in its file where there is none."""
        self.id = row.identifier("question_id")
        self.text: str = row.get("text", str)
        self.category = category
        source = question.values if question is not None else {}
        asked = row.values.get("prompt", row.values.get("question", source.get("text")))
        self.asked = None if asked is None else asked_object(str(asked))
        image = row.values.get("image", source.get("image"))
        self.image = None if image is None else image_name(str(image))

    def contradicts(self, item: Item) -> str | None:
        """Why this cannot be the answer to `item`; None where nothing speaks against it."""
        truth = item.truth
        if self.asked is not None and self.asked != asked_object(truth["question"]):
            return (
                f"asks about {brief(self.asked)}, the label file about {brief(truth['question'])}"
            )
        if self.image is not None and truth["image"] and self.image != image_name(truth["image"]):
            return f"is on {self.image}, the label file's on {image_name(truth['image'])}"
        return None


def asked_object(text: str) -> str:
    """The object a question or a prompt asks about; the first line where it is no such question."""
    text = text.replace("<image>", "").strip()
    match = OBJECT.match(text)
    return (match[1] if match else text.split("\n")[0]).strip().lower()


def image_name(path: str) -> str:
    """A picture's name without folders and suffix."""
    return path.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".jpg")


def pope_answers(
    items: Sequence[Item],
    answers: Mapping[str | None, Sequence[Row]],
    questions: Sequence[Row] | None = None,
) -> list[Answer]:
    """The items' answers, in the items' order; every item has one.

    `answers` are records per category, those of a file for all under None. `questions` are the records
    of a question file (LLaVA's llava_pope_test.jsonl: question_id, image, text, category). DataError where
    categories cannot be told, answers are missing or left over, or records contradict the labels.
    """
    labels: dict[str, list[Item]] = {}
    for item in items:
        labels.setdefault(item.group, []).append(item)
    records = _records(answers, questions)
    strange = {record.category for record in records} - {None} - set(labels)
    if strange:
        raise DataError(
            f"answers of the category {few(sorted(map(str, strange)))}, but the label files are "
            f"{few(labels)}"
        )
    if all(record.category is None for record in records):
        _tell_by_id(records, labels)
    if all(record.category is None for record in records):
        joined = _join_blocks(records, labels)
    elif any(record.category is None for record in records):
        raise DataError("some answers tell their category and some do not")
    else:
        joined = {}
        for category, own in labels.items():
            joined |= _join(category, [r for r in records if r.category == category], own)
    return [Answer(item, joined[item.id]) for item in items]


def _records(
    answers: Mapping[str | None, Sequence[Row]], questions: Sequence[Row] | None
) -> list[Record]:
    known = None
    places: dict[str, int] = {}
    if questions is not None:
        known = by_unique(
            ((row.identifier("question_id"), row) for row in questions), "question id"
        )
        places = {number: place for place, number in enumerate(known)}
    records: list[Record] = []
    for category, rows in answers.items():
        for row in rows:
            question = None
            if known is not None:
                question = known.get(row.identifier("question_id"))
                if question is None:
                    raise DataError(
                        f"{row.place}: question id {row.identifier('question_id')} is not in the "
                        "question file"
                    )
            told = [
                r.get("category", str) for r in (row, question) if r and r.values.get("category")
            ]
            if category:
                told.insert(0, category)
            if len(set(told)) > 1:
                raise DataError(
                    f"{row.place}: of the category {brief(told[0])} or of {brief(told[1])}? Its record, the "
                    "question file and --answers CATEGORY=FILE must agree"
                )
            place = places.get(row.identifier("question_id"), len(records))
            records.append(Record(row, told[0] if told else None, question, place))
    return records


def _tell_by_id(records: Sequence[Record], labels: Mapping[str, Sequence[Item]]) -> None:
    """Set the records' categories where the label files have no question id in common."""
    pairs = [(item.truth["question_id"], item.group) for items in labels.values() for item in items]
    category = dict(pairs)
    if len(category) == len(pairs) and all(record.id in category for record in records):
        for record in records:
            record.category = category[record.id]


def _join_blocks(records: Sequence[Record], labels: Mapping[str, Sequence[Item]]) -> dict[str, str]:
    """Join answers without categories: one block per category, in the only order that fits."""
    sizes = {category: len(items) for category, items in labels.items()}
    if len(records) != sum(sizes.values()):
        told = " + ".join(f"{size} {category}" for category, size in sizes.items())
        raise DataError(
            f"{counted(len(records), 'answer')} for {told} = {counted(sum(sizes.values()), 'question')}.{VERSIONS}"
        )
    fitting: list[dict[str, str]] = []
    furthest, reason = -1, ""
    for order in permutations(labels):
        joined: dict[str, str] = {}
        start = 0
        try:
            for category in order:
                block = records[start : start + sizes[category]]
                joined |= _join(category, block, labels[category])
                start += sizes[category]
        except DataError as error:
            if start > furthest:
                furthest, reason = start, f"as {', '.join(order)}: {error}"
        else:
            fitting.append(joined)
    if not fitting:
        raise DataError(f"the answers fit the label files in no order of the categories; {reason}")
    if any(joined != fitting[0] for joined in fitting):
        raise DataError(
            "the answers fit the label files in more than one order of the categories: give "
            "--questions llava_pope_test.jsonl, or --answers CATEGORY=FILE for each category"
        )
    return fitting[0]


def _join(category: str, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
    """Item id -> answer, for one category: by question id where the ids are the label file's, else by
    image and question, else in order where every record tells its question."""
    by_id = by_unique(((record.id, record.row) for record in records), f"the {category} answer to")
    known = {item.truth["question_id"]: item for item in items}
    if len(records) != len(items):
        missing = [number for number in known if number not in by_id]
        extra = [number for number in by_id if number not in known]
        told = f"; without an answer: {few(missing)}" if missing else ""
        told += f"; without a label: {few(extra)}" if extra else ""
        hint = "." + VERSIONS if category == "random" else ""
        raise DataError(
            f"category {category}: {counted(len(records), 'answer')} for {counted(len(items), 'question')}{told}{hint}"
        )
    if by_id.keys() == known.keys():
        pairs = [(record, known[record.id]) for record in records]
    elif all(r.asked is not None and r.image is not None for r in records):
        pairs = _by_picture(category, records, items)
    elif all(r.asked is not None for r in records):
        pairs = list(zip(records, items, strict=True))
    else:
        missing = [number for number in known if number not in by_id]
        raise DataError(
            f"category {category}: question ids without an answer: {few(missing)}, and answers to "
            f"{few(number for number in by_id if number not in known)}, which the label file has not; "
            "with other ids, every answer must tell its question (`prompt`)"
        )
    wrong = [(r, i, why) for r, i in pairs if (why := r.contradicts(i)) is not None]
    if wrong:
        record, item, why = wrong[0]
        raise DataError(
            f"category {category}: answers not to the questions of the label file: {len(wrong)} of {len(pairs)}, "
            f"question ids {few(r.id for r, _, _ in wrong)}. The first: "
            f"{record.row.place} {why}"
        )
    return {item.id: record.text for record, item in pairs}


def _by_picture(
    category: str, records: Sequence[Record], items: Sequence[Item]
) -> list[tuple[Record, Item]]:
    """Some label files ask a picture the same question twice: then the k-th answer, in the order of the
    question file where there is one, is to the k-th question."""
    known: dict[tuple[str | None, str | None], list[Item]] = {}
    for item in items:
        key = (image_name(item.truth["image"]), asked_object(item.truth["question"]))
        known.setdefault(key, []).append(item)
    given: dict[tuple[str | None, str | None], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.order):
        given.setdefault((record.image, record.asked), []).append(record)
    missing = [record.id for record in records if (record.image, record.asked) not in known]
    often = [r.id for key, found in given.items() for r in found[len(known.get(key, ())) :]]
    if missing or often:
        what = (
            f"question ids {few(missing)}"
            if missing
            else f"some questions are answered too often, the last time by question ids {few(often)}"
        )
        raise DataError(
            f"category {category}: answers whose image and question are not in the label file: {what}"
        )
    return [pair for key, found in given.items() for pair in zip(found, known[key], strict=True)]
