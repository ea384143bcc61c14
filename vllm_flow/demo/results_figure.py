"""The demo's figure: answers, prefill time and KV blocks against the cliff. (matplotlib only)

A policy is a hollow star in each panel, at the cliff that costs as much.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flow import style
from vllm_flow.counts import counted
from vllm_flow.demo.kinds import BY_KEY, HEADLINE, Kind
from vllm_flow.demo.measurements import Results, Row
from vllm_flow.demo.results_table import layers_text
from vllm_flow.demo.rows import equal_from, level_text
from vllm_flow.style import house, save

STYLES = {
    "yes_no": (style.BLUE, "o"),
    "choice": (style.AMBER, "s"),
    "words": (style.VERMILION, "^"),
    "captions": (style.GREEN, "D"),
    "unseen_style": (style.PINK, "v"),
}
"""Kind -> colour and marker."""
FILLED = "Filled points: from there on no difference to the baseline can be told."
BLUE = STYLES[HEADLINE][0]
IDEAL = style.QUIET


def draw(results: Results, directory: Path) -> list[Path]:
    """Write `curve.png` and `curve.svg` into the directory; return their paths."""
    with house() as plt:
        figure, axes = plt.subplots(
            1, 3, figsize=(14, 5.6), layout="constrained", width_ratios=[1.5, 1, 1]
        )
        draw_answers(axes[0], results)
        draw_speed(axes[1], results)
        draw_blocks(axes[2], results)
        if results.policies:
            draw_policies(axes, results)
        for axis in axes:
            axis.set_xlabel("cliff: layers that see the image")
            axis.set_xlim(-0.6, results.engine.num_layers + 0.6)
            axis.xaxis.get_major_locator().set_params(integer=True)
            # Below the axes, where it can hide no point.
            axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(-0.02, -0.12))
        axes[0].get_legend().set(alignment="left")
        axes[0].get_legend().set_title(FILLED, {"size": 9})
        return save(plt, figure, directory / "curve")


def draw_answers(axis: Any, results: Results) -> None:
    """A curve per kind: filled points from where on no difference to the baseline can be told,
    hollow ones below; the headline with its 95 % band."""
    for kind in results.kinds:
        draw_kind(axis, results, kind)
    chances = [(results.chance(kind.key), kind) for kind in results.kinds if kind.key in GUESSED]
    for chance, kind in chances:
        colour = STYLES[kind.key][0]
        axis.axhline(100 * chance, color=colour, linewidth=1, linestyle=":", zorder=1)
        axis.annotate(
            f"guessing, {kind.short}", (results.engine.num_layers, 100 * chance), (0, 3),
            textcoords="offset points", ha="right", fontsize=8, color=colour,
        )  # fmt: skip
    axis.set_ylim(-3, 103)
    axis.set_ylabel("right answers (captions: things found), %")
    axis.set_title("Answers, by kind of question")


GUESSED = (HEADLINE, "choice")
"""Kinds whose level of guessing is drawn; the others' is nil or the same."""


def draw_kind(axis: Any, results: Results, kind: Kind) -> None:
    """One kind's first measure."""
    rows = [row for row in results.rows if kind.key in row.scores]
    cliffs = [row.cliff for row in rows]
    scores = [row.scores[kind.key][kind.measures[0]] for row in rows]
    values = [100 * score.value.value for score in scores]
    colour, marker = STYLES[kind.key]
    wide = kind.key == HEADLINE
    if wide:
        low = [100 * score.value.low for score in scores]
        high = [100 * score.value.high for score in scores]
        axis.fill_between(cliffs, low, high, color=colour, alpha=0.13, linewidth=0)
    level = equal_from(results, kind.key)
    first = cliffs[-1] if level is None else level
    look = {"color": colour, "linewidth": 2.2 if wide else 1.5, "zorder": 4 if wide else 3}
    axis.plot(cliffs, values, **look)
    for filled in (False, True):
        axis.plot(
            [c for c in cliffs if (c >= first) == filled],
            [v for c, v in zip(cliffs, values, strict=True) if (c >= first) == filled],
            linestyle="none",
            marker=marker,
            markersize=6 if wide else 5,
            markeredgecolor=colour,
            markerfacecolor=colour if filled else "white",
            zorder=look["zorder"] + 0.5,
        )
    axis.plot([], [], marker=marker, label=legend_text(results, kind), **look)


def legend_text(results: Results, kind: Kind) -> str:
    """Name, number of questions, and where the curve levels off."""
    count = len(results.of_kind(kind.key))
    band = " questions, 95 % band" if kind.key == HEADLINE else ""
    return f"{LABELS[kind.key]} ({count}{band}): {level_text(results, kind.key)}"


LABELS = {key: kind.short for key, kind in BY_KEY.items()} | {
    "yes_no": "yes/no",
    "choice": "multiple choice",
    "words": "words on signs",
    "captions": "captions, things found",
    "unseen_style": "yes/no, unseen style",
}


def draw_speed(axis: Any, results: Results) -> None:
    """Prefill speed-up with the range over rounds, beside the row-count ideal."""
    cliffs = [row.cliff for row in results.rows]
    axis.plot(
        cliffs,
        [row.speedup_ideal for row in results.rows],
        color=IDEAL,
        linestyle="--",
        label="ideal: rows × layers saved",
    )
    timed = [row for row in results.rows if row.speedup is not None and row.speedup.agrees]
    disturbed = [row for row in results.rows if row.speedup is not None and not row.speedup.agrees]
    if timed:
        middle = [row.speedup.median for row in timed]
        axis.errorbar(
            [row.cliff for row in timed],
            middle,
            yerr=[
                [row.speedup.median - row.speedup.low for row in timed],
                [row.speedup.high - row.speedup.median for row in timed],
            ],
            color=BLUE,
            marker="o",
            markersize=5,
            capsize=2,
            linewidth=2,
            elinewidth=1,
            label=f"measured: median and range of {counted(timed[0].speedup.count, 'round')}",
        )
    if disturbed:
        axis.vlines(
            [row.cliff for row in disturbed],
            [row.speedup.low for row in disturbed],
            [row.speedup.high for row in disturbed],
            color=IDEAL, linewidth=1, linestyle=":",
            label="rounds disagree: the machine was busy",
        )  # fmt: skip
    axis.axhline(1, color=IDEAL, linewidth=1, linestyle=":")
    axis.set_ylim(0, None)
    axis.set_ylabel("times faster than the baseline")
    axis.set_title("Prefill speed-up")


def draw_blocks(axis: Any, results: Results) -> None:
    """KV blocks per yes/no question, measured on the prediction."""
    cliffs = [row.cliff for row in results.rows]
    groups, size = len(results.engine.group_starts), results.engine.block_size
    axis.plot(
        cliffs,
        [row.blocks_predicted for row in results.rows],
        color=IDEAL,
        linestyle="--",
        label=f"predicted: {counted(groups, 'group')}, {size} tokens a block",
    )
    axis.plot(
        cliffs,
        [row.blocks for row in results.rows],
        color=BLUE,
        marker="o",
        markersize=5,
        linestyle="none",
        label="measured",
    )
    axis.set_ylim(0, None)
    axis.set_ylabel("KV blocks per yes/no question")
    axis.set_title("Memory: KV-cache blocks")


Star = tuple[int, float, float]
"""A policy's number, its cliff of equal cost, and what is measured."""

AROUND = {
    "yes_no": (0, 7),
    "choice": (8, 2),
    "words": (8, -4),
    "captions": (0, -14),
    "unseen_style": (-8, -6),
}
"""Kind -> where its stars are labelled, in points: those of one policy stand above each other."""
NO_BREAK = "\N{NO-BREAK SPACE}"
LEGEND = 44
"""Characters of a line of the legend: a longer name would push the panels together."""


def draw_policies(axes: Sequence[Any], results: Results) -> None:
    """Stars in all panels, and in the last one's legend what their numbers stand for."""
    answers, speed, blocks = axes
    answers.set_ylim(-3, 109)  # room for numbers above
    numbered = list(enumerate(results.policies, start=1))
    for kind in results.kinds:
        found = [(n, row.layers, row.score(kind.key)) for n, row in numbered]
        stars = [(n, x, 100 * score.value.value) for n, x, score in found if score is not None]
        draw_stars(answers, stars, STYLES[kind.key][0], AROUND[kind.key])
    timed = [(n, row) for n, row in numbered if row.speedup is not None and row.speedup.agrees]
    speed.vlines(
        [row.layers for _, row in timed],
        [row.speedup.low for _, row in timed],
        [row.speedup.high for _, row in timed],
        color=BLUE, linewidth=1,
    )  # fmt: skip
    # On the side of the curve that is free: one falls, the other rises.
    draw_stars(speed, [(n, row.layers, row.speedup.median) for n, row in timed], BLUE, (5, 8))
    draw_stars(blocks, [(n, row.layers, row.blocks) for n, row in numbered], BLUE, (5, -9))
    look = {"linestyle": "none", "color": style.BLACK}
    blocks.plot(
        [], [], marker="*", markersize=9, markerfacecolor="white",
        label="policy, at the cliff of equal cost", **look,
    )  # fmt: skip
    for number, row in numbered:
        blocks.plot(
            [], [], marker=f"${number}$", markersize=6, markeredgewidth=0,
            label=policy_text(row), **look,
        )  # fmt: skip


def policy_text(row: Row) -> str:
    """A policy and its cost, in lines that are broken between stages."""
    name = str(row.policy).replace(" ", NO_BREAK).replace(";", "; ")
    return textwrap.fill(f"{name}, as{NO_BREAK}cliff{NO_BREAK}{layers_text(row)}", LEGEND)


def draw_stars(
    axis: Any, stars: Sequence[Star], colour: str, label_at: tuple[float, float]
) -> None:
    """Hollow stars with their numbers; those that fall together share a label."""
    from matplotlib.patheffects import withStroke

    for _, x, y in stars:
        axis.plot(
            x, y, linestyle="none", marker="*", markersize=11, zorder=6,
            markeredgecolor=colour, markerfacecolor="white", markeredgewidth=1.2,
        )  # fmt: skip
    low, high = axis.get_ylim()
    for group in together(stars, 0.7, 0.03 * (high - low)):
        numbers = ", ".join(str(number) for number, _, _ in group)
        _, x, y = group[-1]
        horizontal = "center" if label_at[0] == 0 else "left" if label_at[0] > 0 else "right"
        axis.annotate(
            numbers, (x, y), label_at, textcoords="offset points", fontsize=8, color=colour,
            ha=horizontal, va="center" if label_at[0] else "baseline", zorder=7,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def together(stars: Sequence[Star], near_x: float, near_y: float) -> list[list[Star]]:
    """The stars in groups, each near its group's first."""
    groups: list[list[Star]] = []
    for star in stars:
        for group in groups:
            _, x, y = group[0]
            if abs(star[1] - x) <= near_x and abs(star[2] - y) <= near_y:
                group.append(star)
                break
        else:
            groups.append([star])
    return groups
