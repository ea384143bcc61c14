"""The profile's figure: what was reached beside what is possible. (matplotlib only)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_flow.profile.findings import Results
from vllm_flow.style import COLOURS, QUIET, house, save


def draw(results: Results, directory: Path) -> list[Path]:
    """Write ``profile.png`` and ``profile.svg``; return their paths, none without a measurement."""
    panels = [
        panel
        for records, panel in (
            (results.prefill, _prefill),
            (results.load, _load),
            (results.capacity, _capacity),
            (results.decode, _decode),
        )
        if records
    ]
    if not panels:
        return []
    with house(axes_grid_axis="y") as plt:
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.6 * len(panels), 4.4), layout="constrained", squeeze=False
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            panel(axis, results)
            axis.axhline(1, color=QUIET, linewidth=0.8)
            axis.set_ylabel("times stock vLLM: median and range of the rounds")
            axis.set_ylim(0, None)
        return save(plt, figure, directory / "profile")


def _bars(
    axis: Any,
    groups: list[str],
    series: dict[str, list[tuple[float, float, float, float]]],
) -> None:
    """Grouped bars; each value is (median, low, high, ideal), the ideal a dash over its bar."""
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(values))]
        medians = [value[0] for value in values]
        axis.bar(
            places,
            medians,
            width * 0.86,
            color=COLOURS[number % len(COLOURS)],
            label=label if len(series) > 1 else None,
        )
        axis.errorbar(
            places,
            medians,
            yerr=[
                [median - low for median, low, _, _ in values],
                [high - median for median, _, high, _ in values],
            ],
            fmt="none",
            ecolor="black",
            capsize=2,
            linewidth=1,
        )
        first = number == 0
        axis.hlines(
            [value[3] for value in values],
            [place - width * 0.46 for place in places],
            [place + width * 0.46 for place in places],
            color=QUIET,
            linewidth=2,
            linestyle=(0, (2, 1)),
            label="ideal" if first else None,
        )
    axis.set_xticks(range(len(groups)), groups)
    # Below the axes, where it can hide nothing.
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(-0.02, -0.1), ncols=2)


def _prefill(axis: Any, results: Results) -> None:
    rows = results.prefill[1:]
    values = [(r.speedup.median, r.speedup.low, r.speedup.high, r.ideal_rows) for r in rows]
    _bars(axis, [r.system for r in rows], {"prefill": values})
    axis.set_title(f"Prefill speed, batch of {rows[0].batch}")


def _load(axis: Any, results: Results) -> None:
    systems = list(dict.fromkeys(r.system for r in results.load))[1:]
    levels = sorted({r.concurrency for r in results.load})
    series = {
        f"{level} at once": [
            (r.ratio.median, r.ratio.low, r.ratio.high, r.ideal_ratio)
            for system in systems
            for r in results.load
            if (r.system, r.concurrency) == (system, level)
        ]
        for level in levels
    }
    _bars(axis, systems, series)
    axis.set_title("Requests per second under load")


def _capacity(axis: Any, results: Results) -> None:
    rows = results.capacity[1:]
    values = [(r.ratio, r.ratio, r.ratio, r.ideal_ratio) for r in rows]
    _bars(axis, [r.system for r in rows], {"capacity": values})
    axis.set_title(f"Requests at once in {results.capacity[0].pool_mib:.0f} MiB")


def _decode(axis: Any, results: Results) -> None:
    systems = list(dict.fromkeys(r.system for r in results.decode))[1:]
    contexts = sorted({r.image_tokens for r in results.decode})
    series = {
        f"{tokens} image tokens": [
            (r.speedup.median, r.speedup.low, r.speedup.high, r.ideal_bytes)
            for system in systems
            for r in results.decode
            if (r.system, r.image_tokens) == (system, tokens)
        ]
        for tokens in contexts
    }
    _bars(axis, systems, series)
    axis.set_title(f"Decode step speed, batch of {results.decode[0].batch}")
