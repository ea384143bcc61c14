"""Policies beside the demo's cliffs, as table, notes, CSV, JSON, page and figure show them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

from rich.console import Console

from tests.unit.synthetic import ENGINE, IMAGE_TOKENS, POLICIES
from tests.unit.synthetic import FEW_CLIFFS as CLIFFS
from vllm_flow.demo import results_figure, results_table
from vllm_flow.demo.command import WIDTH, show, write_all
from vllm_flow.demo.measurements import Results, Spread

LAYERS = ENGINE.num_layers


def test_table_has_policies_below_the_baseline(beside: Results, alone: Results) -> None:
    console = Console(width=WIDTH, file=io.StringIO())
    long = {"8:50% last_prompt;16:25% last_prompt;24:12.5% last_prompt;28:0": POLICIES["fastv"]}
    (name,) = long
    rows = [*beside.policies, dataclasses.replace(beside.policies[0], policy=name)]
    show(console, dataclasses.replace(beside, policies=rows), [], 0.0)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    firsts = [line.split("|")[1].strip() for line in lines]
    assert firsts[:1] == ["cliff or policy"]
    assert firsts[2:] == [*map(str, CLIFFS), *POLICIES, name]
    assert "…" not in "".join(lines)
    assert results_table.headings(alone)[0] == "cliff"
    assert results_table.headings(beside)[1:] == results_table.headings(alone)[1:]
    said = results_table.line(beside.policies[0], beside)
    assert said.startswith("fastv: yes/no ") and "captions " in said


def test_notes_say_what_policies_are_and_cost(beside: Results, alone: Results) -> None:
    text = " ".join(results_table.notes(beside))
    assert "fastv (2:50% last_prompt) as cliff 16; 0:1/3 uniform as cliff 10;" in text
    assert "runs at every cliff and under every policy" in text
    requests = sum(row.requests for row in (*beside.rows, *beside.policies))
    assert f"{requests} of {requests} requests" in text and requests == len(beside.answers)
    assert "olicies" not in " ".join(results_table.notes(alone))


def test_a_disturbed_policy_is_told_and_not_drawn(beside: Results) -> None:
    first, *others = beside.policies
    disturbed = dataclasses.replace(first, speedup=Spread(2.0, 1.1, 3.1, 4))
    busy = dataclasses.replace(beside, policies=[disturbed, *others])
    total = len(beside.rows) + len(POLICIES)
    assert any(
        f"Disturbed at 1 of {total} cliffs and policies" in n for n in results_table.notes(busy)
    )
    drawn = stars_of(busy)
    assert len(drawn[1]) == len(POLICIES) - 1 and len(drawn[2]) == len(POLICIES)


def test_csv_and_json_hold_policies(beside: Results, tmp_path: Path) -> None:
    results_table.write_csv(beside, tmp_path / "results.csv")
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert list(lines[0])[-1] == "policy"
    for line in lines:
        assert bool(line["cliff"]) != bool(line["policy"])
    measures = sum(len(kind.measures) for kind in beside.kinds)
    for row in beside.policies:
        mine = [line for line in lines if line["policy"] == row.policy]
        assert len(mine) == measures
        assert {float(line["layers"]) for line in mine} == {row.layers}
    results_table.write_json(beside, tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["policy"] for row in data["policies"]] == list(POLICIES)
    assert [row["cliff"] for row in data["rows"]] == list(CLIFFS)
    assert sum(one["policy"] == "fastv" for one in data["answers"]) == len(beside.questions)


def test_page_shows_policies_and_marks_the_baseline(beside: Results, tmp_path: Path) -> None:
    assert all(path.stat().st_size > 0 for path in write_all(beside, tmp_path))
    text = (tmp_path / "index.html").read_text()
    assert f'<tr class="baseline"><td>{LAYERS}</td>' in text
    assert text.count('<tr class="baseline">') == 1
    assert all(f"<tr><td>{name}</td>" in text for name in POLICIES)
    assert "under 3 policies that keep" in text and "<h2>Every cliff and policy</h2>" in text


def stars_of(results: Results) -> list[list[tuple[float, float]]]:
    """Per panel the places of the stars, without the legend's."""
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 3)
    results_figure.draw_policies(axes, results)
    return [
        [(x, y) for line in axis.lines if line.get_marker() == "*" for x, y in line.get_xydata()]
        for axis in axes
    ]


def test_figure_has_a_star_per_policy_and_panel(beside: Results) -> None:
    answers, speed, blocks = stars_of(beside)
    rows = beside.policies
    assert sorted(answers) == sorted(
        (row.layers, 100 * score.value.value)
        for row in rows
        for kind in beside.kinds
        if (score := row.score(kind.key))
    )
    assert speed == [(row.layers, row.speedup.median) for row in rows if row.speedup]
    assert blocks == [(row.layers, row.blocks) for row in rows]
    # Two policies of one cost share a label.
    groups = results_figure.together([(1, 16, 9), (2, 10, 5), (3, 10.4, 5.2), (4, 10, 9)], 0.7, 0.3)
    assert [[number for number, _, _ in group] for group in groups] == [[1], [2, 3], [4]]
    long = dataclasses.replace(
        rows[0], policy="8:50% last_prompt;16:25% last_prompt;24:9 last_prompt"
    )
    lines = results_figure.policy_text(long).splitlines()
    assert (
        len(lines) == 2
        and lines[0].endswith(";")
        and lines[1].endswith("cliff\N{NO-BREAK SPACE}16")
    )
    assert IMAGE_TOKENS / 3 == 48, "a third is whole tokens, so its cliff is whole"
    assert [row.layers for row in rows] == [16, 10, 10]
