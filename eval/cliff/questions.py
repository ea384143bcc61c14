"""What the cliff finder asks: a task's questions or a file's, in random order, and the plan of the search.

No engine in here: what cannot begin is refused before one starts.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vllm_flow.counts import counted
from vllm_flow.eval.cliff import search
from vllm_flow.eval.cliff.bounds import pictures_for, smallest_tolerance
from vllm_flow.eval.cliff.evidence import CliffError, in_random_order, split_at
from vllm_flow.eval.cliff.search import Plan
from vllm_flow.eval.sweep.pictures import preparation
from vllm_flow.eval.sweep.run import read_task
from vllm_flow.eval.sweep.work import TaskWork
from vllm_flow.eval.tasks import Item, Task, get_task
from vllm_flow.eval.tasks.reading import by_unique, read_records

UNLABELLED_ITEMS = 32
"""Questions that are asked without labels, unless --limit says otherwise."""

UNLABELLED_TOKENS = 32
"""Tokens of the answers that are compared, where no task says how long an answer is."""


def read_questions(args: Namespace, conversation: str) -> tuple[TaskWork, Task | None]:
    """The questions in the search's order, and how they are scored (None for a file without labels).

    Args:
        conversation: the name of the model's, which decides what is done to a task's pictures.
    """
    if not os.path.exists(args.data):
        raise CliffError(f"--data {args.data}: there is no such file or folder.")
    if not os.path.isdir(args.data):  # a file, or a pipe
        if not args.unlabelled:
            raise CliffError(
                f"{args.data} is a file of questions without labels; add --unlabelled, or give the "
                "folder that holds the task's data."
            )
        items = questions_of(args.data)
        prepared = preparation(args.image_preparation, "plain", conversation)
        work = TaskWork(args.task, items, UNLABELLED_TOKENS, prepared, args.image_reading)
        task = None
    else:
        task = get_task(args.task).asked_as(args.prompts)
        work = read_task(args.task, args, conversation, None)
    limit = args.limit or (UNLABELLED_ITEMS if args.unlabelled else None)
    items = in_random_order(work.items, args.seed, limit, task)
    if not items:
        raise CliffError(f"{args.data}: no questions in it.")
    return replace(work, items=items), task


def questions_of(path: Path) -> list[Item]:
    """Questions without labels: one JSON object a line, with "text", "image" (a path from the file's folder)
    and perhaps "id".

    Raises:
        DataError: the file cannot be read, or a line lacks something, or an id comes twice.
    """
    beside = path.parent if os.path.isfile(path) else Path()  # a pipe has no folder
    named = [
        (row.identifier("id") if "id" in row.values else str(number), row)
        for number, row in enumerate(read_records(path, "questions"), 1)
    ]
    return [
        Item(name, row.get("text", str), str(beside / row.get("image", str)), {})
        for name, row in by_unique(named, "question").items()
    ]


def make_plan(args: Namespace, items: Sequence[Item], num_layers: int) -> Plan:
    """The search's plan.

    Raises:
        CliffError: too few pictures for the tolerance, whatever the model answers; says how many would do.
    """
    explored = split_at(items, search.EXPLORED)
    left = len({item.picture_of for item in items[explored:]})
    smallest = smallest_tolerance(left, args.confidence) if left else 1.0
    if smallest > args.tolerance:
        needed = pictures_for(args.tolerance, args.confidence) / (1 - search.EXPLORED)
        pictures = len({item.picture_of for item in items})
        raise CliffError(
            f"with {counted(len(items), 'question')} on {counted(pictures, 'picture')} the smallest tolerance that "
            f"can be shown is {percent(smallest)} at {args.confidence:.0%} confidence ({left} of the pictures are kept "
            f"for the test, and not one answer may change); {percent(args.tolerance)} needs about {needed:.0f} "
            "pictures, more where answers change. Take more pictures, or a larger --tolerance."
        )
    return Plan(num_layers, len(items), explored, args.tolerance, args.confidence)


def percent(share: float) -> str:
    """A share in percent, with three significant digits."""
    return f"{100 * share:.3g} %"
