"""Prints two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_flow.counts import counted
from vllm_flow.eval.report import text
from vllm_flow.eval.report.compare import Pair
from vllm_flow.eval.report.results import Options

LONG = 60
"""Characters of a setting that are shown."""


def show_pairs(
    pairs: Sequence[Pair],
    differ: Mapping[str, tuple[object, object]],
    strange: Mapping[str, int],
    names: tuple[str, str],
    options: Options,
) -> None:
    """Print what differs between the runs, and B beside A per task and policy."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"A: {names[0]}\nB: {names[1]}", markup=False)
    for name, (a, b) in differ.items():
        console.print(f"{name}: {_short(a)} in A, {_short(b)} in B", markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in (
        "task",
        "policy",
        "questions",
        "A",
        "B",
        "difference",
        "p (Holm)",
        "same answer",
        "verdict",
    ):
        left = heading in ("task", "policy", "verdict")
        table.add_column(heading, justify="left" if left else "right")
    for pair in pairs:
        c = pair.compared.comparison
        table.add_row(
            text.task_title(pair.task),
            pair.policy,
            str(pair.questions),
            text.number(c.baseline.value, pair.share),
            text.number(c.treatment.value, pair.share),
            f"{text.signed(c.difference.value, pair.share)} {text.limits(c.difference, pair.share, sign=True)}",
            text.p_text(pair.compared.p_corrected),
            text.share_text(pair.agreement),
            text.verdict_text(pair.compared, options.tolerance, pair.share, level=options.level)
            if pair.compared.verdict.finding in ("none", "identical")
            else pair.compared.verdict.finding,
        )
    console.print(table)
    for task, count in strange.items():
        if count:
            console.print(
                f"{text.task_title(task)}: {counted(count, 'question has', 'questions have')} one id "
                "and other words or truths in the two runs, and are left out."
            )


def _short(value: object) -> str:
    shown = str(value)
    return shown if len(shown) <= LONG else shown[: LONG - 3] + "..."
