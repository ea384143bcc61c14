"""What the cliff finder asks: a task's questions or a file's, in random order, and the plan of the search.

No engine in here: what cannot begin is refused before one starts.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vllm_flow.eval.cliff import search
from vllm_flow.eval.cliff.bounds import items_for, smallest_tolerance
from vllm_flow.eval.cliff.evidence import CliffError, in_random_order, split_at
from vllm_flow.eval.cliff.search import Plan
from vllm_flow.eval.sweep.run import read_task
from vllm_flow.eval.sweep.work import TaskWork
from vllm_flow.eval.tasks import Item, Task, get_task

UNLABELLED_ITEMS = 32
"""Questions that are asked without labels, unless --items says otherwise."""

UNLABELLED_TOKENS = 32
"""Tokens of the answers that are compared, where no task says how long an answer is."""


def read_questions(args: Namespace) -> tuple[TaskWork, Task | None]:
    """The questions in the search's order, and how they are scored (None for a file without labels)."""
    preparation = None if args.image_preparation == "task" else args.image_preparation
    if args.data.is_file():
        if not args.unlabelled:
            raise CliffError(
                f"{args.data} is a file of questions without labels; add --unlabelled, or give the "
                "folder that holds the task's data."
            )
        items = read_json_lines(args.data)
        work = TaskWork(args.task, items, UNLABELLED_TOKENS, preparation or "plain")
        task = None
    else:
        task = get_task(args.task)
        work = read_task(args.task, args.data, None, args.seed, preparation)
    limit = args.items or (UNLABELLED_ITEMS if args.unlabelled else None)
    items = in_random_order(work.items, args.seed, limit)
    if not items:
        raise CliffError(f"{args.data}: no questions in it.")
    return TaskWork(work.task, items, work.max_tokens, work.preparation), task


def read_json_lines(path: Path) -> list[Item]:
    """Questions without labels: one JSON object a line, with "text", "image" (a path) and perhaps "id"."""
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CliffError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, image = row["text"], row["image"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CliffError(
                f'{path}:{number}: each line must be an object with "text" and "image" ({error!r}).'
            ) from None
        if not isinstance(text, str) or not isinstance(image, str):
            raise CliffError(f'{path}:{number}: "text" and "image" must be strings.')
        items.append(Item(str(row.get("id", number)), text, str(path.parent / image), {}))
    return items


def make_plan(args: Namespace, items: Sequence[Item], num_layers: int) -> Plan:
    """The search's plan.

    Raises:
        CliffError: too few questions for the tolerance, whatever the model answers; says how many would do.
    """
    explored = split_at(items, search.EXPLORED)
    left = len(items) - explored
    smallest = smallest_tolerance(left, args.confidence) if left > 0 else 1.0
    if smallest > args.tolerance:
        needed = items_for(args.tolerance, args.confidence) / (1 - search.EXPLORED)
        raise CliffError(
            f"with {len(items)} questions the smallest tolerance that can be shown is "
            f"{percent(smallest)} at {args.confidence:.0%} confidence ({left} of them are kept for the "
            f"test, and not one answer may change); {percent(args.tolerance)} needs about {needed:.0f} "
            "questions, more where answers change. Take more questions, or a larger --tolerance."
        )
    return Plan(num_layers, len(items), explored, args.tolerance, args.confidence)


def percent(share: float) -> str:
    """A share in percent, with three significant digits."""
    return f"{100 * share:.3g} %"
