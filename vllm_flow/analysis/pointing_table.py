"""The pointing game's rows as text and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_flow.counts import counted

if TYPE_CHECKING:
    from vllm_flow.analysis.maps import Hits
    from vllm_flow.analysis.pointing import Row

MEAN = -1
"""Stands for the mean of all layers' normalised maps, where a layer is meant."""


def layer_name(layer: int) -> str:
    return "mean" if layer == MEAN else str(layer)


def percent(hits: Hits) -> str:
    return f"{100 * hits.share:5.1f} [{100 * hits.low:4.1f}, {100 * hits.high:4.1f}]"


def report(rows: Sequence[Row], judged: Row) -> str:
    """The table as text."""
    first = rows[0]
    lines = [
        f"{counted(first.target.total, 'round')}; by chance {100 * first.target.chance:.1f} % on the object, "
        f"{100 * first.other.chance:.1f} % on the other one. Shares in % with exact 95 % intervals;",
        f"p one-sided; with {counted(len(rows), 'row')} look for p below {0.05 / len(rows):.4f} (Bonferroni).",
        "",
        "layer  on the object       shuffled weights    on another object   p chance  p control  p other",
    ]
    for row in rows:
        lines.append(
            f"{layer_name(row.layer):>5}  {percent(row.target):<18}  {percent(row.control):<18}  "
            f"{percent(row.other):<18}  {row.target.p_value:8.1g}  {row.p_control:9.1g}  "
            f"{row.p_other:7.1g}"
        )
    lines += [
        "",
        f"Layer {judged.layer}, best on the first half, on the second: "
        f"{percent(judged.target).strip()} % of {judged.target.total}, chance "
        f"{100 * judged.target.chance:.1f} % (p {judged.target.p_value:.1g}), shuffled weights "
        f"{100 * judged.control.share:.1f} % (p {judged.p_control:.1g}), another object "
        f"{100 * judged.other.share:.1f} % (p {judged.p_other:.1g}).",
    ]
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The table, one line per layer and kind of map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "what", "hits", "rounds", "share", "low", "high", "chance", "p"])
        for row in rows:
            for what, hits in (
                ("object", row.target), ("shuffled", row.control), ("another", row.other)
            ):  # fmt: skip
                writer.writerow(
                    [layer_name(row.layer), what, hits.hits, hits.total, f"{hits.share:.4f}",
                     f"{hits.low:.4f}", f"{hits.high:.4f}", f"{hits.chance:.4f}",
                     f"{hits.p_value:.3g}"]
                )  # fmt: skip
