"""A found cliff for people: the profile's frame, a table on the terminal and a figure. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_flow.cliff_file import FORMAT
from vllm_flow.eval.sweep import versions

BLUE, ORANGE, GREEN, QUIET = "#0072B2", "#E69F00", "#009E73", "#555555"

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "svg.hashsalt": "vllm-flow",
}


def profile(model: str, num_layers: int, task: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A profile with one task."""
    return {
        "format": FORMAT,
        "model": model,
        "num_layers": num_layers,
        "tasks": {task: dict(entry)},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: v for name, v in versions().items() if name != "ray"},
    }


# The table.


def show(task: str, entry: Mapping[str, Any], num_layers: int, console: Any = None) -> None:
    """Print the evidence as a table, and the answer in sentences."""
    console = console or Console(width=None)
    evidence = entry["evidence"]
    labelled = evidence["method"] == "labelled"
    console.print(labelled_table(entry, num_layers) if labelled else unlabelled_table(entry))
    for line in (labelled_words if labelled else unlabelled_words)(task, entry, num_layers):
        console.print(line, highlight=False, soft_wrap=True)
    if "attention" in evidence:
        console.print(
            attention_words(evidence["attention"], num_layers), highlight=False, soft_wrap=True
        )


def labelled_table(entry: Mapping[str, Any], num_layers: int) -> Table:
    """One row per layer that was asked."""
    evidence = entry["evidence"]
    tests = {test["layer"]: test for test in evidence["tests"]}
    metric, level = evidence["metric"], f"{evidence['confidence']:.0%}"
    table = Table(box=box.MARKDOWN)
    for heading in ("layers", "questions", f"{metric} %", f"loss, points [{level} each side]"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("test: upper limit of the loss")
    for row in evidence["curve"]:
        layer = row["layer"]
        test = tests.get(layer)
        verdict = "explored only"
        if test is not None:
            sign = "<=" if test["passed"] else ">"
            verdict = (
                f"{100 * test['high']:.2f} {sign} {100 * evidence['tolerance']:.2f} on {test['items']}"
                f" questions: {'passed' if test['passed'] else 'failed'}"
            )
        table.add_row(
            str(layer),
            str(row["items"]),
            f"{100 * row['score']:.1f}",
            f"{100 * row['value']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]",
            verdict,
            style="bold" if layer == entry["flow_cliff"] else None,
        )
    table.add_row(
        str(num_layers), str(evidence["items"]), f"{100 * evidence['baseline']:.1f}", "", "baseline"
    )
    return table


def labelled_words(task: str, entry: Mapping[str, Any], num_layers: int) -> list[str]:
    """The answer, its cost, and what the sample could have shown."""
    evidence, layer = entry["evidence"], entry["flow_cliff"]
    tolerance, confidence = points(evidence["tolerance"]), f"{evidence['confidence']:.0%}"
    if evidence["interval"] is None:
        first = evidence["tests"][0] if evidence["tests"] else None
        lines = [
            f"{task}: no layer is shown to lose at most {tolerance} points at {confidence} confidence; "
            f"the profile says {layer}, which is the baseline."
        ]
        if first is not None and first["value"] <= evidence["tolerance"]:
            lines.append(
                f"Layer {first['layer']}, tested first, lost {points(first['value'])} points and may lose "
                f"{points(first['high'])}: the sample is too small for this tolerance. More questions, "
                "or a larger --tolerance."
            )
    else:
        low, high = evidence["interval"]
        lines = [
            f"{task}: flow_cliff {layer} of {num_layers}. Loss of {evidence['metric']} "
            f"{points(evidence['loss'])} points, at most {points(high)} at {confidence} confidence "
            f"(tolerated: {tolerance})."
        ]
    total, whole = evidence["requests"], evidence["requests_of_a_sweep"]
    lines.append(
        f"Asked {total} requests; every question at every layer would be {whole} "
        f"({100 * total / whole:.0f} %)."
    )
    lines.append(
        f"With these {evidence['items']} questions the smallest tolerance that can be shown is "
        f"{points(evidence['smallest_tolerance'])} points."
    )
    if evidence["items_left_out"]:
        lines.append(f"Left out, since the baseline cannot answer: {evidence['items_left_out']}.")
    if "sweep" in evidence:
        swept = evidence["sweep"]["flow_cliff"]
        lines.append(f"Sweep of every layer, all questions: {swept}.")
    return lines


def unlabelled_table(entry: Mapping[str, Any]) -> Table:
    """One row per layer."""
    evidence = entry["evidence"]
    level = f"{evidence['confidence']:.0%}"
    table = Table(box=box.MARKDOWN)
    for heading in (
        "layers",
        f"KL, nats [{level}]",
        f"same answer % [{level}]",
        "same first token %",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in evidence["curve"]:
        kl, same, token = row["kl"], row["same_answer"], row["same_first_token"]
        table.add_row(
            str(row["layer"]),
            f"{kl['value']:.2g} [{kl['low']:.2g}, {kl['high']:.2g}]",
            f"{100 * same['value']:.0f} [{100 * same['low']:.0f}, {100 * same['high']:.0f}]",
            f"{100 * token['value']:.0f}",
            style="bold" if row["layer"] == entry["flow_cliff"] else None,
        )
    return table


def unlabelled_words(task: str, entry: Mapping[str, Any], num_layers: int) -> list[str]:
    """The answer and what it is based on."""
    evidence = entry["evidence"]
    rule = evidence["by_rule"]
    return [
        f"{task}: flow_cliff {entry['flow_cliff']} of {num_layers}, from which on the "
        f"{'mean' if evidence['rule'] == 'mean' else 'upper limit of the mean'} of KL(baseline || cliff) "
        f"stays at or below {evidence['threshold']:g} nats; by the mean {rule['mean']}, by the upper limit "
        f"{rule['upper']}.",
        f"On {evidence['items']} questions, {evidence['requests']} requests; KL over the whole vocabulary, at the "
        "first answer token. It says how far answers move, not whether they become worse.",
    ]


def attention_words(attention: Mapping[str, Any], num_layers: int) -> str:
    """What attention alone would say, and why it decides nothing."""
    layer, share = attention["flow_cliff"], f"{100 * attention['share']:.3g} %"
    said = (
        f"from layer {layer} on the image has at most {share}"
        if layer < num_layers
        else f"the image has more than {share} in the last layer, so no cliff"
    )
    return (
        f"Attention alone ({attention['items']} questions, first answer token): {said}. "
        f"Not causal. {attention['remark']}"
    )


def points(share: float) -> str:
    """A share as percentage points."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".")


# The figure.


def draw(task: str, entry: Mapping[str, Any], num_layers: int, out: Path) -> list[Path]:
    """Write the evidence beside `out` as OUT-TASK.png and .svg; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evidence = entry["evidence"]
    labelled = evidence["method"] == "labelled"
    panels = 2 + ("attention" in evidence)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            panels, 1, figsize=(8, 3.1 + 1.75 * (panels - 1)), sharex=True, layout="constrained",
            height_ratios=[2.1, *[1] * (panels - 1)],
        )  # fmt: skip
        if labelled:
            draw_loss(axes[0], entry)
            draw_questions(axes[1], evidence)
        else:
            draw_divergence(axes[0], entry)
            draw_agreement(axes[1], evidence)
        if "attention" in evidence:
            draw_attention(axes[2], evidence["attention"])
        for axis in axes:
            axis.axvline(entry["flow_cliff"], color=ORANGE, linewidth=6, alpha=0.25, zorder=0)
            axis.set_xlim(-0.7, num_layers + 0.7)
        axes[-1].set_xlabel("layers that see the image")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        answer = (
            f"{entry['flow_cliff']} of {num_layers} layers"
            if entry["flow_cliff"] < num_layers
            else "no cliff found"
        )
        figure.suptitle(f"{task}: {answer}", x=0.01, ha="left", fontweight="bold", fontsize=12)
        paths = [out.with_name(f"{out.stem}-{task}{ending}") for ending in (".png", ".svg")]
        figure.savefig(paths[0], dpi=160, facecolor="white", metadata={"Software": None})
        figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
        plt.close(figure)
    return paths


def draw_loss(axis: Any, entry: Mapping[str, Any]) -> None:
    """Loss per layer asked, with its limits; tests stand out from what was only explored."""
    evidence = entry["evidence"]
    passed = {test["layer"]: test["passed"] for test in evidence["tests"]}
    kinds = (
        ("explored only", QUIET, "o", lambda layer: layer not in passed),
        ("tested: failed", "#D55E00", "s", lambda layer: passed.get(layer) is False),
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
    axis.set_ylabel(f"loss of {evidence['metric']}, points")
    axis.set_title(f"Loss against the baseline ({evidence['confidence']:.0%} limit on each side)")
    axis.legend(fontsize=9)
    # Near the tolerance is where it is decided; a layer without the image may lose fifty points.
    largest = max([100 * row["high"] for row in evidence["curve"]] + [tolerance])
    if largest > 8 * tolerance:
        axis.set_yscale("symlog", linthresh=2 * tolerance, linscale=1.5)
        from matplotlib.ticker import FixedLocator, FuncFormatter

        steps = [s for s in (-50, -20, -10, -5, 5, 10, 20, 50, 100) if abs(s) > 2.5 * tolerance]
        low = min(100 * row["low"] for row in evidence["curve"])
        ticks = [s for s in steps if 1.2 * low <= s <= 1.2 * largest]
        axis.yaxis.set_major_locator(
            FixedLocator(sorted({*ticks, -2 * tolerance, 0, tolerance, 2 * tolerance}))
        )
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(FixedLocator([]))


def draw_questions(axis: Any, evidence: Mapping[str, Any]) -> None:
    """How many questions each layer was asked."""
    rows = evidence["curve"]
    layers, items = [row["layer"] for row in rows], [row["items"] for row in rows]
    axis.bar(layers, items, color=BLUE, alpha=0.75, width=0.7)
    axis.axhline(evidence["items"], color=QUIET, linewidth=1, linestyle=":")
    axis.set_ylabel("questions")
    share = 100 * evidence["requests"] / evidence["requests_of_a_sweep"]
    axis.set_title(
        f"Questions asked: {evidence['requests']} requests, {share:.0f} % of a full sweep"
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
    axis.set_title(
        f"First answer token moves ({evidence['items']} questions, {evidence['confidence']:.0%} interval)"
    )
    axis.legend(fontsize=9)


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
    axis.set_ylabel("%")
    axis.set_title("Greedy answers equal to the baseline's")


def draw_attention(axis: Any, attention: Mapping[str, Any]) -> None:
    """Attention on the image, layer by layer; for comparison only."""
    masses = attention["image_mass"]
    layers = range(len(masses))
    axis.fill_between(
        layers,
        [100 * mass["low"] for mass in masses],
        [100 * mass["high"] for mass in masses],
        color=ORANGE, alpha=0.25, linewidth=0,
    )  # fmt: skip
    axis.plot(
        layers, [100 * mass["value"] for mass in masses], color=ORANGE, marker="^", markersize=4
    )
    axis.axhline(100 * attention["share"], color=QUIET, linewidth=1, linestyle=":")
    axis.set_ylim(0, None)
    axis.set_ylabel("%")
    axis.set_title(
        f"Attention on the image in layer n (not causal; alone it would say {attention['flow_cliff']})"
    )
