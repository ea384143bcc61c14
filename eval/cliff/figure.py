"""A found cliff as a figure: the evidence, layer by layer. (matplotlib only)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.cliff.ladder import LAYERS, answer_of, label_of, top_of
from vllm_flow.eval.report.text import metric_title, task_title
from vllm_flow.style import AMBER, BLUE, GREEN, QUIET, VERMILION, house, save

BAND: Any = {"color": AMBER, "linewidth": 6, "alpha": 0.25, "zorder": 0}
"""The answer, through all panels."""


def draw(task: str, entry: Mapping[str, Any], num_layers: int, out: Path) -> list[Path]:
    """Write the evidence beside `out` as OUT-TASK.png and .svg; return the paths."""
    evidence = entry["evidence"]
    labelled = evidence["method"] == "labelled"
    top = top_of(entry, num_layers)
    given = evidence.get("ladder", {})
    what = given.get("what", LAYERS) + (f" ({given['given']})" if given else "")
    panels = 2 + ("attention" in evidence)
    with house() as plt:
        figure, axes = plt.subplots(
            panels, 1, figsize=(8, 3.5 + 1.75 * (panels - 1)), sharex=True, layout="constrained",
            height_ratios=[2.1, *[1] * (panels - 1)],
        )  # fmt: skip
        if answer_of(entry) < top:
            for axis in axes:
                axis.axvline(answer_of(entry), **BAND, label="found")
        if labelled:
            draw_loss(axes[0], entry)
            draw_questions(axes[1], evidence)
        else:
            draw_divergence(axes[0], entry)
            draw_agreement(axes[1], evidence)
        if "attention" in evidence:
            draw_attention(axes[2], evidence["attention"], num_layers)
        for axis in axes:
            axis.set_xlim(-0.7, top + 0.7)
        axes[-1].set_xlabel(what)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        if "ladder" in evidence:
            axes[-1].xaxis.set_major_formatter(
                lambda at, _: label_of(evidence, round(at)) if 0 <= round(at) <= top else ""
            )
        answer = "nothing found"
        if answer_of(entry) < top:
            answer = (
                f"{label_of(evidence, answer_of(entry))} {what}"
                if "ladder" in evidence
                else f"{answer_of(entry)} of {counted(num_layers, 'layer')} see the image"
            )
        figure.suptitle(
            f"{task_title(task)}: {answer}", x=0.01, ha="left", fontweight="bold", fontsize=12
        )
        return save(plt, figure, out.with_name(f"{out.stem}-{task}"))


def draw_loss(axis: Any, entry: Mapping[str, Any]) -> None:
    """Loss per layer asked, with its limits; tests stand out from what was only explored."""
    evidence = entry["evidence"]
    passed = {test["layer"]: test["passed"] for test in evidence["tests"]}
    kinds = (
        ("not tested", QUIET, "o", lambda layer: layer not in passed),
        ("tested: failed", VERMILION, "s", lambda layer: passed.get(layer) is False),
        ("tested: passed", BLUE, "D", lambda layer: passed.get(layer) is True),
    )
    for label, colour, marker, belongs in kinds:
        rows = [row for row in evidence["curve"] if belongs(row["layer"])]
        if not rows:
            continue
        axis.errorbar(
            [row["layer"] for row in rows],
            [100 * row["value"] for row in rows],
            yerr=[
                [100 * (row["value"] - row["low"]) for row in rows],
                [100 * (row["high"] - row["value"]) for row in rows],
            ],
            fmt=marker, color=colour, markersize=6, capsize=3, linewidth=1.4,
            markerfacecolor="white" if marker == "o" else colour, label=label,
        )  # fmt: skip
    if "sweep" in evidence:
        rows = evidence["sweep"]["curve"]
        axis.plot(
            [row["layer"] for row in rows], [100 * row["value"] for row in rows],
            color=QUIET, linewidth=1, alpha=0.6, zorder=1, label="sweep of every layer",
        )  # fmt: skip
    tolerance = 100 * evidence["tolerance"]
    axis.axhline(0, color=QUIET, linewidth=0.8)
    axis.axhline(
        tolerance, color=GREEN, linewidth=1.4, linestyle="--", label=f"tolerated: {tolerance:g}"
    )
    metric = metric_title(evidence["metric"])
    axis.set_ylabel(f"loss of {metric}, points")
    titled(axis, f"Loss against the baseline ({evidence['confidence']:.0%} limit on each side)")
    swept = [100 * row["value"] for row in evidence.get("sweep", {}).get("curve", ())]
    largest = max([100 * row["high"] for row in evidence["curve"]] + [*swept, tolerance])
    lowest = min([100 * row["low"] for row in evidence["curve"]] + [*swept, -tolerance / 2])
    # Near the tolerance is where it is decided; a layer without the image may lose fifty points.
    if largest > 8 * tolerance:
        axis.set_ylabel(f"loss of {metric}, points\n(logarithmic beyond {2 * tolerance:g})")
        axis.set_yscale("symlog", linthresh=2 * tolerance, linscale=1.5)
        from matplotlib.ticker import FixedLocator, FuncFormatter

        steps = [s for s in (-50, -20, -10, -5, 5, 10, 20, 50, 100) if abs(s) > 2.5 * tolerance]
        ticks = [s for s in steps if 1.2 * lowest <= s <= 1.2 * largest]
        axis.yaxis.set_major_locator(
            FixedLocator(sorted({*ticks, -2 * tolerance, 0, tolerance, 2 * tolerance}))
        )
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(FixedLocator([]))
    axis.set_ylim(1.3 * lowest, 1.3 * largest)


def draw_questions(axis: Any, evidence: Mapping[str, Any]) -> None:
    """How many questions each layer was asked."""
    rows = evidence["curve"]
    layers, items = [row["layer"] for row in rows], [row["items"] for row in rows]
    axis.bar(layers, items, color=BLUE, width=0.7)
    mark(axis, evidence["items"], f"all {evidence['items']}")
    axis.set_ylabel("questions")
    share = 100 * evidence["requests"] / evidence["requests_of_a_sweep"]
    axis.set_title(
        f"Questions asked: {counted(evidence['requests'], 'request')}, {share:.0f} % of a full sweep"
    )


def draw_divergence(axis: Any, entry: Mapping[str, Any]) -> None:
    """KL per layer with its interval, on a logarithmic scale."""
    evidence = entry["evidence"]
    rows = [row for row in evidence["curve"] if row["kl"]["value"] > 0]
    layers = [row["layer"] for row in rows]
    lowest = min([row["kl"]["value"] for row in rows], default=1e-6) / 3
    axis.fill_between(
        layers,
        [max(row["kl"]["low"], lowest) for row in rows],
        [row["kl"]["high"] for row in rows],
        color=BLUE, alpha=0.18, linewidth=0,
    )  # fmt: skip
    axis.plot(layers, [row["kl"]["value"] for row in rows], color=BLUE, marker="o", markersize=4)
    axis.set_yscale("log")
    threshold = evidence["threshold"]
    axis.axhline(
        threshold, color=GREEN, linewidth=1.4, linestyle="--", label=f"threshold: {threshold:g}"
    )
    axis.set_ylabel("KL(baseline || cliff), nats")
    titled(
        axis,
        f"First answer token moves ({counted(evidence['items'], 'question')}, "
        f"{evidence['confidence']:.0%} interval)",
    )


def draw_agreement(axis: Any, evidence: Mapping[str, Any]) -> None:
    """Share of greedy answers that are the baseline's."""
    rows = evidence["curve"]
    layers = [row["layer"] for row in rows]
    axis.fill_between(
        layers,
        [100 * row["same_answer"]["low"] for row in rows],
        [100 * row["same_answer"]["high"] for row in rows],
        color=GREEN, alpha=0.18, linewidth=0,
    )  # fmt: skip
    values = [100 * row["same_answer"]["value"] for row in rows]
    axis.plot(layers, values, color=GREEN, marker="s", markersize=4)
    axis.set_ylim(None, 103)
    axis.set_ylabel("answers, %")
    axis.set_title("Greedy answers equal to the baseline's")


def draw_attention(axis: Any, attention: Mapping[str, Any], num_layers: int) -> None:
    """Attention on the image, layer by layer; for comparison only."""
    masses = attention["image_mass"]
    layers = range(len(masses))
    axis.fill_between(
        layers,
        [100 * mass["low"] for mass in masses],
        [100 * mass["high"] for mass in masses],
        color=AMBER, alpha=0.25, linewidth=0,
    )  # fmt: skip
    axis.plot(
        layers, [100 * mass["value"] for mass in masses], color=AMBER, marker="^", markersize=4
    )
    mark(axis, 100 * attention["share"], f"{100 * attention['share']:.3g} %")
    axis.set_ylim(0, None)
    axis.set_ylabel("attention, %")
    alone = attention["flow_cliff"]
    said = counted(alone, "layer") if alone < num_layers else "no cliff"
    axis.set_title(f"Attention on the image in layer n (not causal; by itself: {said})")


def mark(axis: Any, height: float, said: str) -> None:
    """A dotted line at `height`, with what it stands for beside its right end."""
    axis.axhline(height, color=QUIET, linewidth=1, linestyle=":")
    axis.annotate(
        said, (1, height), xycoords=("axes fraction", "data"), xytext=(4, 0),
        textcoords="offset points", ha="left", va="center", color=QUIET, fontsize=9,
    )  # fmt: skip


def titled(axis: Any, title: str) -> None:
    """A title, and under it the legend: inside the panel it would lie on curves."""
    names = axis.get_legend_handles_labels()[1]
    columns = 3 if len(names) > 4 else len(names)
    axis.legend(
        fontsize=9, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2,
        borderpad=0.1, columnspacing=2,
    )  # fmt: skip
    axis.set_title(title, pad=8 + 14 * -(-len(names) // columns))
