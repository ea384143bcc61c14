"""Methods at equal cost: what they cost as recorded, who is called better, and where nothing is said."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.multitest import multipletests

from tests.eval.synthetic_run import LAYERS, make_run
from vllm_flow.eval.report.command import read_tasks, write_report
from vllm_flow.eval.report.contests import Budget, Contest, budgets_of, contests, sentences
from vllm_flow.eval.report.cost import (
    Point,
    method_of,
    points,
    read_policies,
    times_by_policy,
    tokens_by_policy,
)
from vllm_flow.eval.report.figures_cost import _tokens, curves, looks_of
from vllm_flow.eval.report.results import Options, Summary
from vllm_flow.eval.report.summary import summarise
from vllm_flow.eval.statistics.intervals import Interval, accuracy
from vllm_flow.eval.sweep.budgets import average_tokens
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.tasks import Item, get_task

FAST = Options(resamples=100, swaps=999)
POLICIES = "baseline,cliff=10,budget=1/2,budget=1/2 last_prompt"


def test_every_point_of_the_figure_is_on_its_axis(tmp_path: Path) -> None:
    """Also text alone, which costs nothing and stands left of that for its method's sake."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    run = make_run(tmp_path, ["scienceqa"], "baseline,text-only,cliff=10,budget=1/3", 20)
    summary, found, _ = read(run, run.answers().to_pylist())
    axis = Figure().subplots()
    curves(axis, summary.tasks[0], found, _tokens, looks_of({"scienceqa": found}))
    left, right = axis.get_xlim()
    drawn = {
        bars.get_label(): [float(x) for x in bars.lines[0].get_xdata()] for bars in axis.containers
    }
    assert len(drawn["cliff"]) == 2 and min(drawn["cliff"]) < 1
    assert all(left < x < right for xs in drawn.values() for x in xs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("equal"), ["scienceqa"], POLICIES, 60)


def read(run: Run, answers: Sequence[dict[str, Any]]) -> tuple[Summary, list[Point], list[Budget]]:
    items, tasks, _ = read_tasks(run)
    summary = summarise(run.meta, items, answers, tasks, FAST)
    policies = read_policies(run.meta)
    tokens = tokens_by_policy(answers, policies, LAYERS)
    found = points(summary, summary.tasks[0], policies, tokens, {})
    budgets = contests(tasks["scienceqa"], summary.tasks[0], items["scienceqa"], found, FAST)
    return summary, found, budgets


def told(budgets: list[Budget]) -> list[str]:
    names = {point.policy: point.policy for one in budgets for point in one.points}
    return [line for one in budgets for line in sentences(one, names, FAST.level, True)]


def test_costs_are_those_of_the_answers(run: Run) -> None:
    policies = read_policies(run.meta)
    answers = run.answers().to_pylist()
    tokens = tokens_by_policy(answers, policies, LAYERS)
    for name, policy in policies.items():
        flow = policy.flow()
        nominal = 144.0 if flow is None else float(average_tokens(flow, LAYERS, 144))
        side = policy.grid(12, LAYERS)
        assert tokens["scienceqa", name] == pytest.approx(side**2 if side else nominal)
    # A question without a picture costs nothing and counts for nothing, and nor does one without an answer.
    without = [dict(answers[0], image_tokens=0, prefill_rows_saved=0), *answers]
    without.append(dict(answers[0], answer=None, image_tokens=9000, prefill_rows_saved=0))
    assert tokens_by_policy(without, policies, LAYERS) == tokens


@pytest.mark.parametrize(
    ("text", "method", "control"),
    [
        ("baseline", "baseline", False),
        ("cliff=7", "cliff", False),
        ("text-only", "cliff", False),
        ("3:1/3 uniform;4:0", "cliff", False),
        ("3:1/3 uniform;20:0", "uniform from layer 3, none from layer 20", True),
        ("cliff=7 when=decode", "cliff, after prefill", False),
        ("downsample=8", "fewer patches", True),
        ("downsample=6x6", "fewer patches", True),
        ("0:64 uniform", "uniform", True),
        ("0:64 random seed=3", "random", True),
        ("4:64 uniform", "uniform from layer 4", True),
        ("0:64 diversity", "diversity", False),
        ("fastv", "last_prompt from layer 2", False),
        ("0:50% uniform;2:9% diversity", "uniform, diversity from layer 2", False),
        ("0:98 diversity;20:0", "diversity, none from layer 20", False),
    ],
)
def test_methods_and_controls(text: str, method: str, control: bool) -> None:
    (policy,) = parse_policies(text, 32)
    found = method_of(policy)
    assert (found.name, found.control) == (method, control)


def test_seeds_are_one_point_with_their_range(run: Run) -> None:
    _, found, _ = read(run, run.answers().to_pylist())
    (drawn,) = (point for point in found if point.method.name == "random")
    assert len(drawn.policies) == 3 and drawn.policy == "0:50% random"
    assert drawn.seeds is not None and drawn.seeds[0] <= drawn.value.value <= drawn.seeds[1]
    assert drawn.between is not None and drawn.between.low < drawn.value.value < drawn.between.high
    assert drawn.between.value == pytest.approx(drawn.value.value)
    assert all(point.seeds is point.between is None for point in found if point is not drawn)


def test_a_budget_is_what_costs_the_same(run: Run) -> None:
    """The cliff at 10 has no rival; reduced pictures stand around a budget that no square meets."""
    _, found, _ = read(run, run.answers().to_pylist())
    (group,) = budgets_of(found)
    assert [point.policy for point in group if point.method.name != "fewer patches"] == [
        "cliff=15", "0:50% diversity", "0:50% random", "0:50% uniform", "2:13/28 last_prompt",
    ]  # fmt: skip
    assert [p.policy for p in group][5:] == ["downsample=8x8", "downsample=9x9"]
    (group,) = budgets_of(
        [replace(group[-1], tokens=9.0), replace(group[-1], tokens=144.0), *found]
    )
    assert [p.tokens for p in group][5:] == [64.0, 81.0]


def answered(run: Run, right: dict[str, float]) -> list[dict[str, Any]]:
    """The run's answers, where of each policy the first questions are answered rightly; 0.5 elsewhere."""
    items, tasks, _ = read_tasks(run)
    order = {item.id: (index, item) for index, item in enumerate(items["scienceqa"])}
    rows = []
    for row in run.answers().to_pylist():
        index, item = order[row["item_id"]]
        well = index < right.get(row["policy"], 0.5) * len(order)
        letter = item.truth["answer"]
        rows.append({**row, "answer": letter if well else "B" if letter == "A" else "A"})
    return rows


def test_a_clear_winner_is_called_so(run: Run) -> None:
    _, _, budgets = read(run, answered(run, {"baseline": 1.0, "0:50% diversity": 0.95}))
    assert told(budgets) == [
        "“0:50% diversity” keeps most: it is shown to be better than every other method."
    ]
    regained = {one.point.policy: one for one in budgets[0].regained}
    best = regained["0:50% diversity"]
    assert best.downsampled == "downsample=9x9" and best.share is not None
    assert best.questions == 30 and best.share.value == 0.9  # 27 of the 30 that it loses
    assert regained["cliff=15"].share is not None and regained["cliff=15"].share.value == 0


def test_where_nothing_can_be_told_nothing_is(run: Run) -> None:
    _, _, budgets = read(run, answered(run, {"0:50% diversity": 0.52}))
    (sentence,) = told(budgets)
    assert sentence.startswith("Nothing can be told of the highest score, “0:50% diversity”")


def test_a_win_at_a_higher_cost_is_none(run: Run) -> None:
    """The larger square costs more than the budget, so that being better proves nothing."""
    _, _, (budget,) = read(run, answered(run, {"downsample=8x8": 0.95, "downsample=9x9": 0.95}))
    smaller, larger = (
        next(p for p in budget.points if p.policy == name)
        for name in ("downsample=8x8", "downsample=9x9")
    )
    beaten = {p.policy for p in budget.beaten_by(smaller, FAST.level, True)}
    assert beaten == {
        "cliff=15", "0:50% diversity", "0:50% random", "0:50% uniform", "2:13/28 last_prompt",
    }  # fmt: skip
    assert not budget.beaten_by(larger, FAST.level, True)


@pytest.mark.parametrize(
    ("more", "wins"), [(-5.0, True), (0.0, True), (0.9, True), (1.0, True), (1.1, False)]
)
def test_a_winner_costs_no_more_to_within_one_token_a_layer(
    run: Run, more: float, wins: bool
) -> None:
    _, found, _ = read(run, run.answers().to_pylist())
    loser, winner = (replace(found[0], tokens=72.0 + extra) for extra in (0.0, more))
    for one, other, value in ((loser, winner, 0.2), (winner, loser, -0.2)):
        pair = Contest(one, other, Interval(value, value - 0.1, value + 0.1), 0.01, 0.04)
        assert pair.winner(0.05, True) is (winner if wins else None)
        assert pair.winner(0.04, True) is None, "a p value at the level shows nothing"


def test_better_can_be_lower(run: Run) -> None:
    summary, found, (budget,) = read(run, answered(run, {"0:50% diversity": 0.95}))
    best = next(p for p in budget.points if p.policy == "0:50% diversity")
    assert budget.beaten_by(best, FAST.level, True)
    assert not budget.beaten_by(best, FAST.level, False)
    values = [point.value.value for point in budget.points]
    assert values == sorted(values, reverse=True)
    items, tasks, _ = read_tasks(run)
    task = type("Lower", (type(tasks["scienceqa"]),), {"higher_is_better": False})()
    (lower,) = contests(task, summary.tasks[0], items["scienceqa"], found, FAST)
    assert [point.value.value for point in lower.points] == sorted(values)


def test_every_pair_of_a_task_is_corrected_for_all_of_them(run: Run) -> None:
    _, _, (budget,) = read(run, answered(run, {"0:50% diversity": 0.75, "cliff=15": 0.6}))
    p_values = [pair.p_value for pair in budget.contests]
    corrected = multipletests(p_values, method="holm")[1].tolist()
    assert [pair.p_corrected for pair in budget.contests] == pytest.approx(corrected) != p_values


def test_times_are_taken_round_by_round() -> None:
    times = times_by_policy({"seconds": {"baseline": [1.0, 4.0, 2.0], "cliff=3": [0.5, 2.4, 1.4]}})
    assert times["cliff=3"].ratio == 0.6 and times["cliff=3"].rounds == 3
    assert (times["cliff=3"].low, times["cliff=3"].high) == (0.5, pytest.approx(0.7))
    assert times["baseline"].ratio == 1
    assert times_by_policy(None) == times_by_policy({"seconds": {"cliff=3": [1.0]}}) == {}


def test_the_page_has_both_axes_and_says_who_wins(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_flow.eval.report.figures.draw_all", lambda *_: {})  # seconds
    names = [policy["name"] for policy in run.meta["policies"]]
    seconds = {name: [1.0, 1.0] if name == "baseline" else [0.5, 0.5] for name in names}
    (run.path / "times.json").write_text(
        json.dumps({"seconds": seconds, "requests": 4, "rounds": 2, "hardware": "a machine"})
    )
    _, page = write_report(run.path, tmp_path / "out", replace(FAST, swaps=199))
    text = page.read_text()
    assert "Methods at equal cost" in text and "72 image tokens per layer." in text
    assert "4 requests at once" in text and "50 % [50, 50]" in text
    for name in ("cost", "time"):
        assert (page.parent / f"{name}.png").stat().st_size > 10_000
    with (page.parent / "cost.csv").open(newline="") as handle:
        rows = {row["policy"]: row for row in csv.DictReader(handle)}
    assert float(rows["cliff=15"]["image_tokens_per_layer"]) == pytest.approx(72)
    assert rows["0:50% random"]["control"] == "True" and rows["0:50% random"]["lowest_seed"]
    with (page.parent / "contests.csv").open(newline="") as handle:
        assert len(list(csv.DictReader(handle))) == 7 * 6 / 2


def test_answers_that_are_scored_together_are_so_in_a_contest() -> None:
    """MMBench's headline counts questions of which every rotation is right: no single answer has it."""
    task = get_task("mmbench")
    truth = {"answer": "A", "options": {"A": "x", "B": "y"}, "question": "?", "rotations": 2}
    items = [
        Item(
            f"{q}/{r}",
            "?",
            f"{q // 8}.jpg",
            {**truth, "question_id": f"{q}", "image_id": f"{q // 8}"},
        )
        for q in range(40)
        for r in range(2)
    ]
    policies = parse_policies("baseline,0:50% uniform,0:50% diversity,downsample=8x8", LAYERS, 12)
    # The last of so many questions has a wrong rotation.
    wrong = {"0:50% uniform": 2, "downsample=8x8": 4}
    rows = [
        {
            "task": "mmbench", "item_id": item.id, "policy": policy.name, "error": None,
            "answer": "B" if place % 2 and (place // 2 + 1) % wrong.get(policy.name, 99) == 0 else "A",
            "image_tokens": 64 if policy.kind == "downsample" else 144, "prefill_rows_saved": 72 * LAYERS,
        }
        for policy in policies
        for place, item in enumerate(items)
    ]  # fmt: skip
    meta = {"num_layers": LAYERS, "policies": [policy.as_json() for policy in policies]}
    summary = summarise(meta, {"mmbench": items}, rows, {"mmbench": task}, FAST)
    result, known = summary.tasks[0], read_policies(meta)
    found = points(summary, result, known, tokens_by_policy(rows, known, LAYERS), {})
    (budget,) = contests(task, result, items, found, FAST)
    value = {one.policy.name: one.values["accuracy"].value for one in result.policies}
    assert value["0:50% uniform"] == 0.5 and value["downsample=8x8"] == 0.75
    for pair in budget.contests:
        expected = value[pair.other.policy] - value[pair.one.policy]
        assert pair.difference.value == pytest.approx(expected)
    ours = next(one for one in budget.regained if one.point.policy == "0:50% uniform")
    # Of ten questions that the reduced picture loses, two on each of five pictures, all are lost here as well.
    assert ours.share is not None and ours.share.value == 0
    assert ours.share.high == pytest.approx(accuracy(0, 5).high)
