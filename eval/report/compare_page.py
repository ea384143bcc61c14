"""The page of `vllm-flow report A B ...`: what its template shows. One HTML file without outside parts.

Looks like a single run's page (`page`) and shares its style, its cards and its words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_flow.eval.report import text
from vllm_flow.eval.report.compare import arm
from vllm_flow.eval.report.comparison import ACROSS, Comparison, doubts, gaps, task_view, titles
from vllm_flow.eval.report.examples import examples
from vllm_flow.eval.report.matching import settings_that_differ
from vllm_flow.eval.report.page import data_uri, saving_rows, settings, shown_value
from vllm_flow.eval.report.results import Options, Summary, policies_of
from vllm_flow.eval.report.savings import savings
from vllm_flow.eval.report.templates import environment
from vllm_flow.outputs import write_text

OF_ONE_RUN = ("command", "created", "data", "limit", "policies", "engines", "tolerance",
              "image preparation")  # fmt: skip
"""Rows of a run's settings that say nothing of the other runs."""


def flipped(compared: Comparison, options: Options) -> list[dict[str, Any]]:
    """Examples per task and run, of its first pair in which a score differs."""
    found = []
    reading = str(compared.reference.meta.get("image_reading", "server"))
    for task in compared.tasks:
        for side in compared.others:
            pair = next(
                (
                    pair
                    for pair in compared.of(task)
                    if pair.run == side.label and (pair.result.gained or pair.result.lost)
                ),
                None,
            )
            if pair is None:
                continue
            said = {
                (task, arm(one.label, policy), row["item_id"]): row["answer"]
                for one, policy in (
                    (compared.reference, pair.reference_policy),
                    (side, pair.policy),
                )
                for row in one.answers
                if (row["task"], row["policy"]) == (task, policy) and row["answer"] is not None
            }
            items = compared.questions[side.label][task].items
            one = examples(pair.read, items, said, None, options.seed, reading)
            if one:
                found.append({**one, "reference": pair.reference.policy.name})
    return found


def costs(compared: Comparison) -> list[tuple[str, list[list[str]]]]:
    """What each run's policies saved on the questions compared, beside the run's own baseline."""
    found = []
    for side in compared.sides:
        common = {
            (task, item.id)
            for label, own in compared.questions.items()
            if side is compared.reference or label == side.label
            for task, one in own.items()
            for item in one.items
        }
        answers = [row for row in side.answers if (row["task"], row["item_id"]) in common]
        policies = policies_of(side.meta, side.answers)
        layers = side.meta.get("num_layers")
        summary = Summary(layers, policies, (), savings(policies, answers, layers))
        found.append((side.label, saving_rows(summary)))
    return found


def differing_rows(compared: Comparison) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, as text."""
    found = settings_that_differ([side.meta for side in compared.sides])
    return [
        (name.replace("_", " "), ["–" if v is None else shown_value(v) for v in values])
        for name, values in found.items()
    ]


def errors(compared: Comparison) -> list[tuple[str, str, str, int, str]]:
    """Run, task, policy, number and reason of requests that ended in an error."""
    found = []
    for side in compared.sides:
        known = {p.name: p for p in policies_of(side.meta, side.answers)}
        reasons = Counter(
            (row["task"], row["policy"], row["error"] or "no reason given")
            for row in side.answers
            if row["answer"] is None and row["task"] in compared.tasks
        )
        found += [
            (side.label, text.task_title(task), text.policy_title(known[policy]), count, reason)
            for (task, policy, reason), count in sorted(reasons.items())
        ]
    return found


def write_page(
    path: Path,
    compared: Comparison,
    figures: Mapping[str, Path],
    options: Options,
    note: str | None = None,
) -> None:
    """Write the page; `figures` are the SVG files by name, `note` is what the data says of itself."""
    names = titles(compared)
    apart = {name for name, _ in differing_rows(compared)}
    same = [row for row in settings(compared.reference.meta) if row[0] not in apart]
    page = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            reference=compared.reference.label,
            others=[side.label for side in compared.others],
            sides=compared.sides,
            against=None if compared.against is None else names[compared.against],
            differing=differing_rows(compared),
            note=note,
            gaps=gaps(compared),
            doubts=doubts(compared),
            tasks=[task_view(compared, task, names, options) for task in compared.tasks],
            figures={name: data_uri(svg, "svg+xml") for name, svg in figures.items()},
            costs=costs(compared),
            examples=flipped(compared, options),
            errors=errors(compared),
            settings=[row for row in same if row[0] not in OF_ONE_RUN],
            versions=[
                f"{name} {value}"
                for name, value in compared.reference.meta.get("versions", {}).items()
                if f"version of {name}" not in apart
            ],
            commands=[
                (side.label, shown_value(side.meta.get("command", "not recorded")))
                for side in compared.sides
            ],
            options=options,
            tolerance=text.exact(options.tolerance),
            across=ACROSS,
        )
    )
    write_text(path, page)
