"""Scores answers to the tasks whose items have an id of their own, from one file.

`--data` is what `vllm-flow eval` reads for the task; an answer is a JSON object with an item's id and what was
said. Names that the benchmarks' own result files use for the two are known (`questionId` and `answer` of
DocVQA, `image` and `answer` of VizWiz, `id` and `response` of AMBER, ...). MME's and RefCOCO's two questions on one
picture may share an id, as in LLaVA's file; the prompt then tells them apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.eval.tasks.base import Item, Scored, Task
from vllm_flow.eval.tasks.reading import DataError, Row, brief, few

if TYPE_CHECKING:
    from vllm_flow.eval.scoring.command import Result

HELP = {
    "ai2d": "science diagrams, multiple choice: accuracy",
    "amber": "objects a description invents: CHAIR, Cover, Hal, Cog (spaCy's vectors)",
    "amber-words": "the same without word vectors",
    "chartqa": "charts: relaxed accuracy, 5 %% of a number's size",
    "docvqa": "documents: ANLS",
    "gqa": "compositional questions: accuracy, binary and open",
    "infovqa": "infographics: ANLS",
    "mmbench": "multiple choice, rotated: circular accuracy, rule-based part",
    "mme": "pairs of yes/no questions: perception and cognition",
    "mmstar": "multiple choice that needs the image: accuracy per category",
    "ocrbench": "reading: right answers out of 1000",
    "realworldqa": "photographs: exact match",
    "refcoco": "boxes as LLaVA-1.5 writes them: IoU of one half",
    "refcoco-internvl": "boxes as InternVL writes them",
    "refcoco-qwen": "boxes as Qwen2-VL writes them",
    "refcoco-qwen3": "boxes as Qwen3-VL writes them",
    "vizwiz": "photographs by blind people: soft accuracy over ten annotators",
}
IDS = ("question_id", "questionId", "index", "id", "image")
TEXTS = ("text", "prediction", "predict", "response", "answer", "pred")


def add_parsers(tasks: Any) -> list[argparse.ArgumentParser]:
    """A subcommand per task, and per task of another package; none of these is imported for it."""
    from vllm_flow.eval.tasks import RESERVED, TASKS

    others = {
        name: f"of the package {found[0].distribution}".replace("%", "%%")
        for name, found in TASKS.added.items()
        if name not in TASKS.own and name not in RESERVED
    }
    parsers = []
    for name, told in (HELP | others).items():
        parser = tasks.add_parser(name, help=told)
        parser.add_argument(
            "--data", type=Path, required=True, metavar="DIR", help="the benchmark's files"
        )
        parser.add_argument("--answers", type=Path, required=True, metavar="FILE")
        parsers.append(parser)
    return parsers


def score_plain(args: argparse.Namespace) -> Result:
    """Score a file of answers.

    Raises:
        DataError: a file is not as it must be, or an answer is to no question, or comes twice.
        PluginError: the task is a package's that cannot be used.
    """
    from vllm_flow.eval.scoring.command import Result
    from vllm_flow.eval.tasks import get_task
    from vllm_flow.eval.tasks.reading import read_records

    task = get_task(args.task)
    items = task.read(args.data)
    answers = joined(items, read_records(args.answers))
    scored = [task.score(item, answers[item.id]) for item in items if item.id in answers]
    missing = [item.id for item in items if item.id not in answers]
    notes = []
    if missing:
        notes.append(
            f"questions without an answer: {len(missing)} of {len(items)}, left out, which no official "
            f"script does: {few(missing)}"
        )
    torn = unfinished(task, items, scored)
    if torn:
        notes.append(
            f"{counted(torn, 'question lacks', 'questions lack')} an answer to one of the parts that are "
            "scored together"
        )
    return Result(task, scored, notes)


def joined(items: Sequence[Item], rows: Iterable[Row]) -> dict[str, str]:
    """Item's id -> what was said, by id, or by question where several items share the id."""
    by_id = {item.id: [item] for item in items}
    shared: dict[str, list[Item]] = {}
    for item in items:
        shared.setdefault(str(item.truth.get("question_id")), []).append(item)
    by_id = shared | by_id  # an item's own id before one that it shares
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    unknown: list[str] = []
    for row in rows:
        key = next((name for name in IDS if name in row.values), IDS[0])
        name = row.identifier(key)
        answered = _which(by_id.get(name, []), row)
        if answered is None:
            unknown.append(f"{name} ({row.place})")
            continue
        if answered.id in found:
            raise DataError(
                f"{row.place}: the answer to {answered.id} comes twice (first: {places[answered.id]})"
            )
        text = next((name for name in TEXTS if name in row.values and name != key), TEXTS[0])
        found[answered.id], places[answered.id] = row.get(text, str), row.place
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'answer is', 'answers are')} to no question of the data "
            f"(by {' or '.join(IDS)}): {few(unknown)}"
        )
    return found


def _which(items: Sequence[Item], row: Row) -> Item | None:
    """The item that an answer is to, among those with its id."""
    if len(items) <= 1:
        return items[0] if items else None
    asked = row.values.get("prompt", row.values.get("question"))
    if not isinstance(asked, str):
        raise DataError(
            f"{row.place}: {len(items)} questions have this id ({few(item.id for item in items)}): name one of "
            "them, or give the prompt"
        )
    words = asked.replace("<image>", "").split("\n")
    head = next((line.strip() for line in words if line.strip()), "")
    fitting = [item for item in items if _same_question(head, item)]
    if len(fitting) != 1:
        raise DataError(
            f"{row.place}: {brief(head)} is the question of {counted(len(fitting), 'item')} of this id"
        )
    return fitting[0]


def _same_question(asked: str, item: Item) -> bool:
    """Whether a prompt's first line is the question, with or without its request at the end."""
    question = str(item.truth.get("question", ""))
    return bool(asked) and (asked == question.strip() or question.startswith(asked))


def unfinished(task: Task, items: Sequence[Item], scored: Sequence[Scored]) -> int:
    """Bundles of which some answers are there and some are not."""
    there: dict[str, int] = {}
    for one in scored:
        there[one.bundle[0]] = there.get(one.bundle[0], 0) + 1
    sizes = dict(task.bundle(item) for item in items)
    return sum(0 < there.get(name, 0) < size for name, size in sizes.items())
