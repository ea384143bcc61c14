"""What rounds become: medians, their range, and how far the rounds leave a ratio's median open."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vllm_flow.eval.statistics.intervals import median
from vllm_flow.profile.command import add_arguments
from vllm_flow.profile.findings import LEAST_ROUNDS, Decode, Results, Spread, ratios
from vllm_flow.profile.presets import PRESETS
from vllm_flow.profile.speed_tables import interval_note, tables

seconds = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=30)


def test_spread() -> None:
    assert Spread.of([3, 1, 2]) == Spread(2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError):
        Spread.of([])


@given(seconds)
def test_ratios_are_taken_within_a_round(pairs: list[tuple[float, float]]) -> None:
    """A round in which everything takes as many times as long changes nothing."""
    base, other = zip(*pairs, strict=True)
    found = ratios(base, other)
    assert found == ratios([4 * b for b in base], [4 * o for o in other])
    each = [b / o for b, o in pairs]
    assert (found.median, found.low, found.high, found.rounds) == (
        median_of(each), min(each), max(each), len(each),
    )  # fmt: skip
    assert found.interval == median(each)
    assert (found.interval is None) == (found.rounds < LEAST_ROUNDS)
    with pytest.raises(ValueError):
        ratios(base, other[1:])


def median_of(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def shown(rounds: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """The table and the JSON of a decode whose ratios are 1.00, 0.99, 0.98 and so on."""
    stock = [1 - n / 100 for n in range(rounds)]
    row = Decode("baseline", 576, 4, Spread.of([1.0] * rounds), ratios(stock, [1.0] * rounds), 1.0)
    results = Results(
        command="c", created="now", model="m", shape={}, workload={}, engine={}, limits={}, decode=(row,)
    )  # fmt: skip
    console = Console(width=200)
    with console.capture() as text:
        console.print(*tables(results, "decode"))
    written = json.loads(results.write(folder).read_text())
    return text.get(), written["decode"][0]["speedup"]


def test_an_interval_stands_beside_the_ratio(tmp_path: Path) -> None:
    table, written = shown(9, tmp_path)
    assert "0.96 [0.92, 1.00] | 0.930 to 0.990" in table
    assert written["interval"] == pytest.approx({"value": 0.96, "low": 0.93, "high": 0.99})


def test_too_few_rounds_say_so(tmp_path: Path) -> None:
    table, written = shown(5, tmp_path)
    assert "0.98 [0.96, 1.00] |    none |" in table
    assert written["interval"] is None and written["median"] == 0.98
    assert "5 rounds allow none, --rounds 6" in interval_note(5)
    assert interval_note(6).endswith("of 6 rounds.")


@pytest.mark.parametrize("preset", ["default", "cuda"])
def test_what_requests_without_a_policy_pay_has_an_interval(preset: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    runs = [parser.parse_args(shlex.split(line)) for _, line in PRESETS[preset]]
    assert any(run.rounds >= LEAST_ROUNDS and "baseline" in run.policies for run in runs)
