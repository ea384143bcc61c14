"""Prints runs beside the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_flow.eval.report import text
from vllm_flow.eval.report.compare import Pair
from vllm_flow.eval.report.compare_page import differing_rows
from vllm_flow.eval.report.comparison import (
    ACROSS,
    Comparison,
    cells,
    doubts,
    gaps,
    task_view,
    titles,
)
from vllm_flow.eval.report.results import Options

LONG = 60
"""Characters of a setting that are shown."""
HEADINGS = ("policy", "pairs", "reference", "run", "difference", "p (Holm)", "found")
LEFT = ("policy", "found")
FOUND = {"none": "none", "identical": "the same"}


def show_pairs(compared: Comparison, options: Options) -> None:
    """Print what differs between the runs, every pair, and what could not be paired."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    names = titles(compared)
    console.print(f"reference: {compared.reference.path}", markup=False)
    for side in compared.others:
        console.print(f"{side.label}: {side.path}", markup=False)
    for name, values in differing_rows(compared):
        told = ", ".join(
            f"{_short(value)} in {side.label}"
            for side, value in zip(compared.sides, values, strict=True)
        )
        console.print(f"{name}: {told}", markup=False)
    for task in compared.tasks:
        for side in compared.others:
            own = [pair for pair in compared.of(task) if pair.run == side.label]
            if own:
                table = Table(box=box.SIMPLE_HEAD, title=_title(own[0]), title_justify="left")
                _fill(table, [cells(pair, pair.read.headline, names, options) for pair in own])
                console.print(table)
        view = task_view(compared, task, names, options)
        for line in view["said"] + view["questions"]:
            console.print(line, markup=False)
    if len(compared.tasks) > 1:
        console.print(ACROSS)
    for line in [*gaps(compared), *doubts(compared)]:
        console.print(line, markup=False)


def _title(pair: Pair) -> str:
    percent = ", %" if pair.share(pair.read.headline) else ""
    return f"{text.task_title(pair.task)}, {text.metric_title(pair.read.headline)}{percent}: {pair.run}"


def _fill(table: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    for one in rows:
        table.add_row(
            one["policy"],
            str(one["paired"]),
            one["before"],
            one["value"],
            f"{one['difference']} {one['difference_limits']}",
            one["corrected"],
            FOUND.get(one["finding"], one["finding"]),
        )


def _short(value: str) -> str:
    return value if len(value) <= LONG else value[: LONG - 3] + "..."
