"""A found cliff on the terminal: the evidence as a table, the answer in sentences. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_flow.counts import counted
from vllm_flow.eval.cliff.ladder import answer_of, label_of, top_of
from vllm_flow.eval.report.text import metric_title
from vllm_flow.policy_keys import CLIFF_KEY, POLICY_KEYS


def show(task: str, entry: Mapping[str, Any], num_layers: int, console: Any = None) -> None:
    """Print the evidence as a table, and the answer in sentences."""
    # A pipe has no width of its own; a narrower terminal wraps.
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=120)
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
    what = evidence.get("ladder", {}).get("what", "layers")
    metric, level = metric_title(evidence["metric"]), f"{evidence['confidence']:.0%}"
    table = Table(box=box.MARKDOWN)
    for heading in (what, "questions", f"{metric} %", f"loss, points [{level} each side]"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("test", no_wrap=True)
    for row in evidence["curve"]:
        layer = row["layer"]
        test = tests.get(layer)
        verdict = "not tested"
        if test is not None:
            verdict = (
                f"{'passed' if test['passed'] else 'failed'}: at most {100 * test['high']:.2f}"
            )
        table.add_row(
            label_of(evidence, layer),
            str(row["items"]),
            f"{100 * row['score']:.1f}",
            f"{100 * row['value']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]",
            verdict,
            style="bold" if layer == answer_of(entry) else None,
        )
    table.add_row(
        label_of(evidence, top_of(entry, num_layers)),
        str(evidence["items"]),
        f"{100 * evidence['baseline']:.1f}",
        "",
        "baseline",
    )
    return table


def labelled_words(task: str, entry: Mapping[str, Any], num_layers: int) -> list[str]:
    """The answer, its cost, and what the sample could have shown."""
    evidence, found = entry["evidence"], policy_words(entry, num_layers)
    tolerance, confidence = f"{100 * evidence['tolerance']:g}", f"{evidence['confidence']:.0%}"
    if evidence["interval"] is None:
        first = evidence["tests"][0] if evidence["tests"] else None
        one = "Rung" if "ladder" in evidence else "Layer"
        lines = [
            f"{task}: no {one.lower()} is shown to lose at most {tolerance} points at {confidence} confidence; "
            f"the profile says {num_layers}, which is the baseline."
        ]
        if first is not None and first["value"] <= evidence["tolerance"]:
            lines.append(
                f"{one} {label_of(evidence, first['layer'])}, tested first, lost {points(first['value'])} points "
                f"and may lose {points(first['high'])}: the sample is too small for this tolerance. More questions, "
                "or a larger --tolerance."
            )
    else:
        low, high = evidence["interval"]
        lines = [
            f"{task}: {found}. Loss of {metric_title(evidence['metric'])} in its test "
            f"{points(evidence['loss'])} points, at most {points(high)} at {confidence} confidence "
            f"(tolerated: {tolerance})."
        ]
    if evidence["tests"]:
        lines.append(
            f"Tests are on the {counted(evidence['tests'][0]['items'], 'question')} that exploration did not see, from "
            "the deepest layer down to the first that fails; the losses above are on all questions of a layer."
        )
    total, whole = evidence["requests"], evidence["requests_of_a_sweep"]
    lines.append(
        f"Asked {counted(total, 'request')}, {100 * total / whole:.0f} % of the {whole} for every question at "
        "every layer."
    )
    items, pictures = evidence["items"], evidence.get("pictures", evidence["items"])
    on = f" on {counted(pictures, 'picture')}" if pictures < items else ""
    lines.append(
        f"With {counted(items, 'question')}{on} the smallest tolerance that can be shown is "
        f"{points(evidence['smallest_tolerance'])} points."
    )
    if evidence["items_left_out"]:
        lines.append(f"Left out, since the baseline cannot answer: {evidence['items_left_out']}.")
    if "sweep" in evidence:
        swept = label_of(evidence, evidence["sweep"]["flow_cliff"])
        lines.append(f"Sweep of every layer, all questions: {swept}.")
    return lines


def policy_words(entry: Mapping[str, Any], num_layers: int) -> str:
    """The policy that was found, as the profile has it."""
    given = entry["evidence"].get("ladder")
    if given is None:
        return f"flow_cliff {entry[CLIFF_KEY]} of {num_layers}"
    keys = ", ".join(f"{key} {value}" for key, value in entry.items() if key in POLICY_KEYS)
    return f"{keys} (given: {given['given']})"


def unlabelled_table(entry: Mapping[str, Any]) -> Table:
    """One row per layer."""
    evidence = entry["evidence"]
    level = f"{evidence['confidence']:.0%}"
    table = Table(box=box.MARKDOWN)
    for heading in (
        evidence.get("ladder", {}).get("what", "layers"),
        f"KL, nats [{level}]",
        f"same answer % [{level}]",
        "same first token %",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in evidence["curve"]:
        kl, same, token = row["kl"], row["same_answer"], row["same_first_token"]
        table.add_row(
            label_of(evidence, row["layer"]),
            f"{kl['value']:.2g} [{kl['low']:.2g}, {kl['high']:.2g}]",
            f"{100 * same['value']:.0f} [{100 * same['low']:.0f}, {100 * same['high']:.0f}]",
            f"{100 * token['value']:.0f}",
            style="bold" if row["layer"] == answer_of(entry) else None,
        )
    return table


def unlabelled_words(task: str, entry: Mapping[str, Any], num_layers: int) -> list[str]:
    """The answer and what it is based on."""
    evidence = entry["evidence"]
    rule = evidence["by_rule"]
    return [
        f"{task}: {policy_words(entry, num_layers)}, from which on the "
        f"{'mean' if evidence['rule'] == 'mean' else 'upper limit of the mean'} of KL(baseline || cliff) "
        f"stays at or below {evidence['threshold']:g} nats; by the mean {label_of(evidence, rule['mean'])}, by the "
        f"upper limit {label_of(evidence, rule['upper'])}.",
        f"On {counted(evidence['items'], 'question')}"
        + (f" about {counted(evidence['pictures'], 'picture')}" if "pictures" in evidence else "")
        + f", {counted(evidence['requests'], 'request')}; KL over the whole "
        "vocabulary, at the first answer token. It says how far answers move, not whether they become worse.",
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
        f"Attention alone ({counted(attention['items'], 'question')}, first answer token): {said}. "
        f"Not causal. {attention['remark']}"
    )


def points(share: float) -> str:
    """A share as percentage points."""
    return f"{round(100 * share, 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # -0.0 + 0.0 is 0.0
