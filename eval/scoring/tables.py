"""What `vllm-flow score` prints: the metrics as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_flow.eval.report.text import metric_title, task_title
from vllm_flow.eval.tasks.base import Scored, Task

LABELS = {
    "f1": "F1", "accuracy": "accuracy", "precision": "precision", "recall": "recall",
    "yes_ratio": "said yes", "img_accuracy": "accuracy with image", "chair_s": "CHAIR_s",
    "chair_i": "CHAIR_i", "len": "tokens per caption",
}  # fmt: skip


def show(task: Task, metrics: Mapping[str, float], scored: Sequence[Scored]) -> None:
    """Print the metrics as a table: shares in per cent, and in points where the benchmark counts these."""
    from rich.console import Console

    console = Console(highlight=False)
    is_pope = task.name.partition("-")[0] == "pope"
    console.print(pope_table(metrics, scored) if is_pope else plain_table(task, metrics, scored))


def pope_table(metrics: Mapping[str, float], scored: Sequence[Scored]) -> Any:
    from rich.table import Table

    from vllm_flow.eval.tasks.pope import CATEGORIES

    columns = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    table = Table(title="POPE, in %", title_justify="left")
    table.add_column("category")
    table.add_column("answers", justify="right")
    for name in columns:
        table.add_column(LABELS[name], justify="right")
    present = [category for category in CATEGORIES if f"f1_{category}" in metrics]
    for category in present:
        count = sum(one.group == category for one in scored)
        values = (f"{100 * metrics[f'{name}_{category}']:.2f}" for name in columns)
        table.add_row(category, str(count), *values, end_section=category == present[-1])
    means = (f"{100 * metrics[name]:.2f}" for name in columns)
    table.add_row("mean", str(len(scored)), *means, style="bold")
    return table


def plain_table(task: Task, metrics: Mapping[str, float], scored: Sequence[Scored]) -> Any:
    from rich.table import Table

    table = Table(title=task_title(task.name), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    if task.full_marks:
        table.add_column(justify="right", no_wrap=True)
    for name, value in metrics.items():
        cells = [f"{value:.1f}" if name == "len" else f"{100 * value:.2f} %"]
        if name in task.full_marks:
            most = task.full_marks[name]
            cells.append(f"{most * value:.2f} of {most:.0f} points")
        table.add_row(LABELS.get(name) or metric_title(name), *cells)
    if task.name.startswith("scienceqa"):
        with_image = sum(one.counts.get("img_answered", 0.0) for one in scored)
        table.add_row("questions", str(len(scored)))
        table.add_row("answered, with image", f"{with_image:.0f}")
    else:
        table.add_row("captions" if task.name.startswith("chair") else "answers", str(len(scored)))
    return table
