"""The demo's results as a table on the terminal, as JSON and as CSV. Knows no engine."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vllm_flow.counts import counted
from vllm_flow.demo.kinds import HEADLINE, Kind
from vllm_flow.demo.measurements import AGREEMENT, TRIMMED, Results, Row, Score, Spread
from vllm_flow.demo.rows import equal_from, level_text
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.outputs import write_text, write_whole

CSV_FIELDS = (
    "cliff",
    "kind",
    "measure",
    "questions",
    "part",
    "whole",
    "value",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "chance",
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_ideal",
    "kv_blocks",
    "kv_blocks_predicted",
    "layers",
    "policy",
)


def percent(value: float) -> str:
    """A share as a whole percentage without the sign."""
    return f"{100 * value:.0f}"


def bracket(interval: Interval, signed: bool = False) -> str:
    """An interval in percent or percentage points."""
    form = "{:+.0f}, {:+.0f}" if signed else "{:.0f}, {:.0f}"
    return "[" + form.format(100 * interval.low, 100 * interval.high) + "]"


def p_text(p: float) -> str:
    """A p value with as many digits as it deserves, with its sign of relation."""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}" if p < 0.1 else f"p={p:.2f}"


def difference_text(score: Score) -> str:
    """Paired difference in percentage points, its interval and p."""
    points = round(100 * score.difference.value)  # an int: no "-0"
    return f"{points:+d} {bracket(score.difference, signed=True)} {p_text(score.p_value)}"


def blocks_text(value: float) -> str:
    """A mean number of blocks; a whole one without decimals."""
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def cells(row: Row, results: Results) -> list[str]:
    """One row of the terminal's table, as text."""
    headline = row.score(HEADLINE)
    assert headline is not None
    out = [
        str(row.setting),
        f"{percent(headline.value.value)} {bracket(headline.value)}",
        "baseline" if row is results.baseline else difference_text(headline),
    ]
    for kind in results.kinds[1:]:
        scores = row.scores.get(kind.key, {})
        out.append(" / ".join(percent(scores[m].value.value) for m in kind.measures if scores))
    if row.speedup is None:
        out.append("")
    else:
        out.append(speed_text(row.speedup))
    out.append(f"{row.speedup_ideal:.2f}")
    out.append(f"{blocks_text(row.blocks)} / {blocks_text(row.blocks_predicted)}")
    return out


def speed_text(speed: Spread) -> str:
    """The median over rounds and their range, or that the rounds tell no number."""
    spread = f"[{speed.low:.2f}, {speed.high:.2f}]"
    return f"{speed.median:.2f} {spread}" if speed.agrees else f"disturbed {spread}"


def line(row: Row, results: Results) -> str:
    """One row in a short line, while others are still to come."""
    parts = []
    for kind in results.kinds:
        scores = row.scores.get(kind.key, {})
        shares = " / ".join(percent(scores[m].value.value) for m in kind.measures if scores)
        if shares:
            parts.append(f"{kind.short} {shares} %")
    name = row.policy if row.cliff is None else f"cliff {row.cliff:>2}"
    said = f"{name}: {', '.join(parts)}"
    if row.speedup is not None:
        said += f"; prefill × {speed_text(row.speedup)}, ideal {row.speedup_ideal:.2f}"
    return f"{said}; {blocks_text(row.blocks)} KV blocks"


def headings(results: Results) -> list[str]:
    """The columns of `cells`."""
    return [
        "cliff or policy" if results.policies else "cliff",
        f"{results.kinds[0].short} % [CI]",
        "difference [CI]",
        *(
            f"{kind.short} %" if len(kind.measures) == 1 else "/".join(kind.measures)
            for kind in results.kinds[1:]
        ),
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
    for row in results.policies:
        out.add_row(*cells(row, results))
    return out


def asked_text(kind: Kind, results: Results) -> str:
    """How many questions of a kind, by which rule, and what guessing gives."""
    count = len(results.of_kind(kind.key))
    chance = results.chance(kind.key)
    said = f"{count} {kind.what} ({kind.rule}"
    if not kind.every_cliff:
        said += f"; at {counted(len(results.cliffs_of(kind.key)), 'cliff')}"
    return said + (f"; guessing gives {percent(chance)} %)" if chance else ")")


def notes(results: Results) -> list[str]:
    """What the columns mean, in sentences with this run's numbers."""
    engine, rows = results.engine, [*results.rows, *results.policies]
    requests = sum(row.requests for row in rows)
    equal = sum(row.blocks_equal for row in rows)
    levels = ", ".join(f"{kind.short} {level_text(results, kind.key)}" for kind in results.kinds)
    asked = "; ".join(asked_text(kind, results) for kind in results.kinds)
    out = [
        f"Asked, one per picture: {asked}. Yes/no with Wilson's 95 % interval; its difference to the "
        "baseline in percentage points on the same questions, with Newcombe's paired 95 % interval "
        "and exact McNemar p. Intervals of all kinds: results.csv.",
    ]
    if any(kind.key == "captions" for kind in results.kinds):
        out.append(
            "found / invented: of the things in the pictures, the share that captions name; of the "
            "things they name, the share that is not there. By whole words, singular or plural, "
            "of the demo's list of things."
        )
    if results.policies:
        out.append(policies_text(results))
    out += [
        f"Where no paired difference to the baseline excludes zero any more: {levels}. An observation "
        "about this run, each comparison by itself: few questions cannot tell small differences.",
        "KV blocks: measured / predicted, mean per yes/no question, over "
        f"{counted(len(engine.group_starts), 'storage group')} with {engine.block_size}-token blocks; measured "
        f"equals predicted in every group for {equal} of {counted(requests, 'request')} of all kinds.",
    ]
    if rows[0].speedup is not None:
        count = rows[0].speedup.count
        trimmed = ", the lowest and the highest left out," if count >= TRIMMED else ""
        out.append(
            f"Prefill: how many times faster than the baseline, median and range of "
            f"{counted(count, 'round')}{trimmed} in which the same batch runs {everywhere(results)}, and three times "
            "at the baseline, whose median counts; ideal: rows times layers, of the last layer with image "
            "rows their keys and values. Without the vision tower "
            "and the preparation of pictures."
        )
    disturbed = disturbed_rows(results)
    if disturbed:
        out.append(
            f"Disturbed at {len(disturbed)} of {len(rows)} {settings_text(results)}: something else wanted the cores, "
            f"and rounds of the same work differ by more than a factor of {AGREEMENT}. No speed-up is "
            "told or drawn for them; run it again on a quiet machine."
        )
    out.append(
        f"Engine: vLLM {engine.vllm}, torch {engine.torch}, {engine.dtype}, {engine.device}; all "
        f"kinds{',' if results.policies else ' and'} {settings_text(results)} in one engine, mixed in its batches."
    )
    return out


def settings_text(results: Results) -> str:
    """What was asked at, in the plural."""
    return "cliffs and policies" if results.policies else "cliffs"


def everywhere(results: Results) -> str:
    """Where a timed batch runs."""
    return "at every cliff and under every policy" if results.policies else "at every cliff"


def policies_text(results: Results) -> str:
    """What the policies below the baseline are, and which cliffs cost as much."""
    told = "; ".join(
        f"{row.policy}"
        + (f" ({row.stages})" if row.stages != row.policy else "")
        + f" as cliff {layers_text(row)}"
        for row in results.policies
    )
    return (
        "Policies, below the baseline, as `vllm-flow eval` names them (LAYER:KEEP RANK: what stays of an image from "
        "a layer on) or by their preset. Each costs in prefill as much as a cliff, the number of layers that see an "
        f"image token, on average over the image: {told}."
    )


def layers_text(row: Row) -> str:
    """The cliff of equal cost, with a decimal where it is none that could be asked."""
    return f"{row.layers:.0f}" if round(row.layers, 1) == round(row.layers) else f"{row.layers:.1f}"


def disturbed_rows(results: Results) -> list[Row]:
    """Rows whose timing rounds do not agree."""
    rows = [*results.rows, *results.policies]
    return [row for row in rows if row.speedup is not None and not row.speedup.agrees]


def as_json(results: Results) -> dict[str, Any]:
    """The records as they are, plain types only, after a summary of the kinds."""
    kinds = {
        kind.key: dataclasses.asdict(kind)
        | {
            "questions": len(results.of_kind(kind.key)),
            "chance": results.chance(kind.key),
            "cliffs": results.cliffs_of(kind.key),
            "no_difference_from": equal_from(results, kind.key),
        }
        for kind in results.kinds
    }
    return {"kinds": kinds} | dataclasses.asdict(results)


def write_json(results: Results, path: Path) -> None:
    """`results.json`: every question, answer and row."""
    write_text(path, json.dumps(as_json(results), indent=1, default=str) + "\n")


def write_csv(results: Results, path: Path) -> None:
    """`results.csv`: one line per cliff or policy, kind and measure, for spreadsheets."""
    write_whole(path, partial(_write_lines, results))


def _write_lines(results: Results, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(CSV_FIELDS)
        for row in (*results.rows, *results.policies):
            speed = row.speedup
            for kind in (kind for kind in results.kinds if kind.key in row.scores):
                for measure, score in row.scores[kind.key].items():
                    writer.writerow(
                        [
                            "" if row.cliff is None else row.cliff,
                            kind.key,
                            measure,
                            len(results.of_kind(kind.key)),
                        ]
                        + [score.part, score.whole, *dataclasses.astuple(score.value)]
                        + [*dataclasses.astuple(score.difference), score.p_value]
                        + [results.chance(kind.key)]
                        + ([speed.median, speed.low, speed.high] if speed else ["", "", ""])
                        + [row.speedup_ideal, row.blocks, row.blocks_predicted]
                        + [row.layers, row.policy or ""]
                    )
