"""Scores what lmms-eval recorded, by our rules, beside lmms-eval's own scores of the same answers.

Its `--log_samples` writes a JSON object per question: `doc_id`, the row of the hub's split, counted from 0;
`input`, the prompt; `filtered_resps`, what was said; and what its own scorer made of it. A row is also what our
tasks know a picture by when they read the hub's parquet, so the row joins the two, and the prompt checks the join.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.eval.tasks.base import Item
from vllm_flow.eval.tasks.pictures import parquet_place
from vllm_flow.eval.tasks.reading import DataError, Row, brief, by_unique, few

if TYPE_CHECKING:
    from vllm_flow.eval.scoring.command import Result

FAILED = "[LMMS_EVAL_"
"""What it records in an answer's place where the server gave none."""

NO_SCORES = {
    "doc_id",
    "target",
    "filtered_resps",
    "resps",
    "arguments",
    "doc_hash",
    "token_counts",
    "input",
}
"""Fields of every record, whatever the task; a target may be a number."""


def add_parser(tasks: Any) -> argparse.ArgumentParser:
    """The subcommand."""
    parser: argparse.ArgumentParser = tasks.add_parser(
        "lmms-eval", help="answers that lmms-eval recorded (--log_samples), to any task's questions"
    )
    parser.add_argument("--as", dest="rule", required=True, metavar="TASK", help="whose rule")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the hub's parquet that it asked"
    )
    parser.add_argument(
        "--answers", type=Path, required=True, metavar="FILE", help="DATE_samples_TASK.jsonl"
    )
    return parser


@dataclass(frozen=True)
class Sample:
    """One recorded answer."""

    text: str
    asked: str
    theirs: float | None
    """lmms-eval's own score of it, where it is a number."""
    place: str


def score_samples(args: argparse.Namespace) -> Result:
    """Score the answers, and say where lmms-eval scored them differently.

    Raises:
        DataError: a file is not as it must be, an answer is to no question of the data or to another one than
            was asked, or the server failed it.
    """
    from vllm_flow.eval.scoring.command import Result
    from vllm_flow.eval.tasks import get_task
    from vllm_flow.eval.tasks.reading import read_records

    try:
        task = get_task(args.rule)
    except ValueError as error:
        raise DataError(f"--as: {error}") from None
    items = task.read(args.data)
    samples = read_samples(read_records(args.answers))
    pairs = joined(items, samples)
    scored = [task.score(item, sample.text.strip()) for item, sample in pairs]
    notes = []
    if len(pairs) < len(items):
        notes.append(
            f"questions without an answer, left out: {len(items) - len(pairs)} of {len(items)}"
        )
    return Result(task, scored, [*notes, *beside([sample for _, sample in pairs], scored)])


def read_samples(rows: Iterable[Row]) -> dict[int, Sample]:
    """The samples by their row of the split.

    Raises:
        DataError: a record is none of lmms-eval's, a row comes twice, or requests failed.
    """
    by_row = by_unique(((row.get("doc_id", int), row) for row in rows), "the answer to row")
    samples, failed = {}, []
    for number, row in by_row.items():
        text = row.get("filtered_resps", (str, list))
        if isinstance(text, list):
            if len(text) != 1 or not isinstance(text[0], str):
                raise DataError(f"{row.place}: filtered_resps is {brief(text)}, not one text")
            text = text[0]
        if text.startswith(FAILED):
            failed.append(f"row {number}: {text[:200]}")
        samples[number] = Sample(text, str(row.values.get("input", "")), _own(row), row.place)
    if failed:
        raise DataError(
            f"lmms-eval got no answer to {len(failed)} of {counted(len(samples), 'question')} and scored its own "
            f"note of it: {few(failed, 1)}; ask again"
        )
    return samples


def _own(row: Row) -> float | None:
    """The first score among what lmms-eval's scorer recorded: a number, or an object that has one."""
    for value in row.values.values():
        score = value.get("score") if isinstance(value, Mapping) else None
        if isinstance(score, (int, float)):
            return float(score)
    for name, value in row.values.items():
        if name not in NO_SCORES and isinstance(value, (int, float)):  # TextVQA's 1 is an integer
            return float(value)
    return None


def joined(items: Sequence[Item], samples: Mapping[int, Sample]) -> list[tuple[Item, Sample]]:
    """The items that were answered, in their order.

    Raises:
        DataError: the items are not of one split's parquet files, or a sample fits no item.
    """
    by_row = rows_of(items)
    unknown = [f"{number} ({samples[number].place})" for number in samples if number not in by_row]
    if unknown:
        raise DataError(
            f"answers to rows that have no question with a picture in the data: {len(unknown)} of {len(samples)}, "
            f"{few(unknown)}"
        )
    for number, sample in samples.items():
        question = _first_line(by_row[number].text)
        if question.lower() not in sample.asked.lower():
            raise DataError(
                f"{sample.place}: asked {brief(_first_line(sample.asked))}, and row {number} of the data is "
                f"{brief(question)}; is this the data that lmms-eval read?"
            )
    known = {item.id: number for number, item in by_row.items()}
    answered = [item for item in items if known[item.id] in samples]
    return [(item, samples[known[item.id]]) for item in answered]


def rows_of(items: Sequence[Item]) -> dict[int, Item]:
    """Items by the row of their split, counted over its files.

    Raises:
        DataError: a picture is none of a parquet file's, or the files are of several splits.
    """
    import pyarrow.parquet as pq

    places = [parquet_place(item.image) for item in items]
    if not all(places):
        raise DataError(
            "lmms-eval counts the rows of the hub's parquet files, so --data must be a folder of these, and of "
            "questions that have a picture"
        )
    files = sorted({file for file, _ in filter(None, places)})
    splits = {(file.parent, file.name.partition("-")[0]) for file in files}
    if len(splits) > 1:
        told = few(sorted(str(folder / split) for folder, split in splits))
        raise DataError(f"--data: the files of several splits ({told}); give the folder of one")
    before, rows = {}, 0
    for file in files:
        before[file] = rows
        rows += pq.read_metadata(file).num_rows
    return {
        before[place[0]] + place[1]: item
        for item, place in zip(items, places, strict=True)
        if place is not None
    }


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def beside(samples: Sequence[Sample], scored: Sequence[Any]) -> list[str]:
    """What lmms-eval made of the same answers, as a sentence."""
    pairs = [
        (one, sample.theirs)
        for one, sample in zip(scored, samples, strict=True)
        if sample.theirs is not None
    ]
    if not pairs:
        return []
    theirs = sum(score for _, score in pairs) / len(pairs)
    ours = sum(one.score for one, _ in pairs) / len(pairs)
    other = [one.id for one, score in pairs if abs(one.score - score) > 1e-6]
    said = f"answers scored differently: {len(other)} of {len(pairs)}, {few(other)}"
    same = f"answers scored alike: all {len(pairs)}"
    return [
        f"mean score of an answer: {100 * theirs:.2f} % by lmms-eval, {100 * ours:.2f} % by our rule; "
        + (said if other else same)
    ]
