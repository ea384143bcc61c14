"""The demo's results as a table on the terminal, as JSON and as CSV. Knows no engine."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vllm_flow.showcase.records import SPLIT_TITLES, Interval, Results, Row, Score

SHORT_TITLES = {"seen": "right", "unseen_style": "unseen", "photo": "photos"}


CSV_FIELDS = (
    "cliff",
    "split",
    "questions",
    "correct",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "difference",
    "difference_low",
    "difference_high",
    "mcnemar_p",
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_ideal",
    "kv_blocks",
    "kv_blocks_predicted",
)


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage without the sign."""
    return f"{100 * value:.{digits}f}"


def bracket(interval: Interval, signed: bool = False) -> str:
    """An interval in percent or percentage points."""
    form = "{:+.0f}, {:+.0f}" if signed else "{:.0f}, {:.0f}"
    return "[" + form.format(100 * interval.low, 100 * interval.high) + "]"


def p_text(p: float) -> str:
    """A p value with as many digits as it deserves, with its sign of relation."""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}" if p < 0.1 else f"p={p:.2f}"


def difference_text(score: Score) -> str:
    """Paired difference in percentage points, its interval and p."""
    paired = score.against_baseline
    interval = bracket(paired.difference, signed=True)
    return f"{100 * paired.difference.value:+.1f} {interval} {p_text(paired.p_value)}"


def blocks_text(value: float) -> str:
    """A mean number of blocks; a whole one without decimals."""
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def cells(row: Row, results: Results) -> list[str]:
    """One row of the terminal's table, as text."""
    baseline = row is results.baseline
    splits = results.splits
    headline = row.scores[splits[0]]
    out = [
        str(row.cliff),
        f"{percent(headline.accuracy.value)} {bracket(headline.accuracy)}",
        "baseline" if baseline else difference_text(headline),
    ]
    out += [percent(row.scores[split].accuracy.value, 0) for split in splits[1:]]
    if row.speedup is None:
        out.append("")
    else:
        speed = row.speedup
        out.append(f"{speed.median:.2f} [{speed.low:.2f}, {speed.high:.2f}]")
    out.append(f"{row.speedup_ideal:.2f}")
    out.append(f"{blocks_text(row.blocks)} / {blocks_text(row.blocks_predicted)}")
    return out


def headings(results: Results) -> list[str]:
    """The columns of `cells`."""
    splits = results.splits
    return [
        "cliff",
        f"{SHORT_TITLES.get(splits[0], splits[0])} % [95% CI]",
        "difference [95% CI]",
        *(f"{SHORT_TITLES.get(split, split)} %" for split in splits[1:]),
        "prefill × [range]",
        "ideal",
        "KV blocks",
    ]


def table(results: Results) -> Table:
    """The table as rich prints it; its lines are Markdown, so that they can be pasted."""
    out = Table(box=box.MARKDOWN, show_edge=True)
    for heading in headings(results):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in results.rows:
        out.add_row(*cells(row, results), style="bold" if row is results.baseline else None)
    return out


def notes(results: Results) -> list[str]:
    """What the columns mean, in sentences with this run's numbers."""
    counts = {s: sum(q.split == s for q in results.questions) for s in results.splits}
    asked = "; ".join(f"{counts[s]} on {SPLIT_TITLES.get(s, s)}" for s in results.splits)
    engine, rows = results.engine, results.rows
    requests = sum(row.requests for row in rows)
    equal = sum(row.blocks_equal for row in rows)
    out = [
        f"Questions: {asked}; answers are read by POPE's rule. Shares with Wilson's interval; "
        "differences to the baseline in percentage points on the same "
        f"{counts[results.splits[0]]} questions, with Newcombe's paired interval and exact "
        "McNemar p.",
        f"KV blocks: measured / predicted, mean per request, over {len(engine.group_starts)} "
        f"storage groups with {engine.block_size}-token blocks; measured equals predicted in every "
        f"group for {equal} of {requests} requests.",
    ]
    if rows[0].speedup is not None:
        out.append(
            f"Prefill: how many times faster than the baseline, median and range of "
            f"{rows[0].speedup.count} rounds in which the same batch runs at every cliff; ideal: "
            "rows times layers. Without the vision tower and the preparation of pictures."
        )
    out.append(
        f"Engine: vLLM {engine.vllm}, torch {engine.torch}, {engine.dtype}, {engine.device}; all "
        "cliffs in one engine, mixed in every batch."
    )
    return out


def as_json(results: Results) -> dict[str, Any]:
    """The records as they are, plain types only."""
    return dataclasses.asdict(results)


def write_json(results: Results, path: Path) -> None:
    """`results.json`: every answer and every row."""
    path.write_text(json.dumps(as_json(results), indent=1, default=str) + "\n")


def write_csv(results: Results, path: Path) -> None:
    """`results.csv`: one line per cliff and split, for spreadsheets."""
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(CSV_FIELDS)
        for row in results.rows:
            speed = row.speedup
            for split, score in row.scores.items():
                paired = score.against_baseline
                writer.writerow(
                    [row.cliff, split, score.total, score.correct]
                    + [*dataclasses.astuple(score.accuracy)]
                    + [*dataclasses.astuple(paired.difference), paired.p_value]
                    + ([speed.median, speed.low, speed.high] if speed else ["", "", ""])
                    + [row.speedup_ideal, row.blocks, row.blocks_predicted]
                )
