"""A report's core in a terminal: every policy's score, where a cliff lies, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_flow.counts import counted
from vllm_flow.eval.report import text
from vllm_flow.eval.report.page import doubts, gaps, task_view
from vllm_flow.eval.report.results import Options, Summary


def show(summary: Summary, options: Options) -> None:
    """Print the core of the report: every policy's score, the cliffs, what is missing."""
    console = Console(highlight=False)
    views = [
        task_view(task, summary.num_layers, options)
        for task in summary.tasks
        if any(result.answered for result in task.policies)
    ]
    for view in views:
        console.print(scores_table(view))
        if view["swept"]:
            console.print(f"{view['cliff']}\n")
    if sum(view["swept"] for view in views) > 1:
        console.print(text.ACROSS_TASKS)
    for gap in [*gaps(summary, {}), *doubts(summary)]:
        console.print(gap)


def scores_table(view: Mapping[str, Any]) -> Table:
    """A task's headline under each policy, beside the baseline; 80 columns hold it. The verdicts in words are the
    page's."""
    unit = ", %" if view["percent"] else ""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{view['title']}, {counted(view['items'], 'question')}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("policy", no_wrap=True)
    table.add_column(f"{view['metric']}{unit}", justify="right")
    for heading in ("difference", "p", "flips"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in view["rows"]:
        table.add_row(
            row["policy"],
            f"{row['value']} {row['limits']}".rstrip(),
            f"{row['difference']} {row['difference_limits']}".rstrip(),
            row["corrected"],
            row["flips"],
            style="bold" if row["shown"] else None,
        )
    return table
