"""Policies beside the demo's cliffs: what is asked, what a row says of them, and how they are shown."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.unit.synthetic import ENGINE, IMAGE_TOKENS, synthetic_results
from vllm_flow.demo import results_figure, results_table
from vllm_flow.demo.command import WIDTH, add_arguments, settings_of, show, write_all
from vllm_flow.demo.measurements import Answer, Reading, Results, Spread
from vllm_flow.demo.policies import read_policies
from vllm_flow.demo.rows import ideal_speedup, layers_that_see, predicted_blocks, summarise
from vllm_flow.demo.serving import Asker, mixtures
from vllm_flow.eval.sweep.policies import PolicySpecError
from vllm_flow.exits import Refused
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.policy_keys import parse_policy
from vllm_flow.profile.ideal import row_count_ideal

LAYERS = ENGINE.num_layers
POLICIES = {
    "fastv": FlowPolicy(((Stage(2, Fraction(1, 2), "last_prompt"),),)),
    "0:1/3 uniform": FlowPolicy(((Stage(0, Fraction(1, 3), "uniform"),),)),
    "0:1/3 diversity": FlowPolicy(((Stage(0, Fraction(1, 3), "diversity"),),)),
}
CLIFFS = (0, 10, 20, LAYERS)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A small run with policies."""
    return synthetic_results(tmp_path_factory.mktemp("pictures"), 12, CLIFFS, POLICIES)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The same without."""
    return synthetic_results(tmp_path_factory.mktemp("pictures"), 12, CLIFFS)


def answer(prompt: int, image: int, policy: str | None = None, cliff: int | None = None) -> Answer:
    return Answer("", cliff, "", Reading(0, {}), prompt, image, prompt + 7, (), policy)


# What is asked


def test_text_becomes_cliffs_and_named_policies() -> None:
    asked = read_policies(
        "baseline, cliff=3,text-only, fastv,0:1/3 uniform,budget=1/3 cliff diversity", LAYERS
    )
    assert asked.cliffs == (3, 0, 10), "a third of 30 layers is a cliff"
    assert asked.policies == POLICIES
    assert read_policies(None, LAYERS).policies == {} == read_policies("vtw", LAYERS).policies


def test_of_a_budget_all_but_reduced_pictures_is_asked() -> None:
    named = read_policies("budget=48", LAYERS, full_grid=12)
    assert named.cliffs == (10,)
    assert list(named.policies) == [
        "0:48 uniform", "0:48 random", "0:48 random seed=1", "0:48 random seed=2", "0:48 diversity",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["downsample=8", "fastv,downsample=6x6", "budget=1/3 downsample"])
def test_reduced_pictures_are_refused(text: str) -> None:
    with pytest.raises(PolicySpecError, match="asks pictures as they are; leave downsample out"):
        read_policies(text, LAYERS, full_grid=12)


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def test_settings_are_cliffs_up_to_the_baseline_and_policies() -> None:
    args = options("--cliffs", "0,20", "--policies", "cliff=10,fastv")
    cliffs, policies = settings_of(args, LAYERS, None)
    assert (cliffs, policies) == ([0, 10, 20, LAYERS], {"fastv": POLICIES["fastv"]})
    assert settings_of(options("--cliffs", "4"), LAYERS, 12) == ([4, LAYERS], {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fastvv", "--policies: policy 'fastvv': .* did you mean 'fastv'"),
        ("cliff=31", "--policies: .*the model has 30 decoder layers"),
        ("downsample=8", "--policies: policy 'downsample=8': .*leave downsample out"),
        ("", "--policies: policy ''"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        settings_of(options("--policies", text), LAYERS, 12)


# What is sent


def asker(llm: Any = None) -> Asker:
    return Asker(llm, ENGINE, str, POLICIES)


def test_requests_carry_their_policy() -> None:
    for name, policy in POLICIES.items():
        assert parse_policy(asker().keys(name), LAYERS) == policy
    assert asker().keys(10) == {"flow_cliff": 10}
    assert asker().keys(LAYERS) is None


def test_policies_come_after_the_cliffs_with_every_kind(
    monkeypatch: pytest.MonkeyPatch, beside: Results
) -> None:
    took = SimpleNamespace(prompt_tokens=9, image_tokens=4, computed_tokens=9, blocks=())
    monkeypatch.setattr(
        Asker, "run", lambda self, jobs, what: ((job, f"{what} {job[1]}", took) for job in jobs)
    )
    steps = list(asker().ask(beside.questions, CLIFFS, [0, LAYERS]))
    assert [done for done, _ in steps] == [
        [LAYERS, 20], [10, 0], ["fastv", "0:1/3 uniform"], ["0:1/3 diversity"],
    ] == list(mixtures(CLIFFS, POLICIES))  # fmt: skip
    for done, found in steps:
        assert {one.setting for one in found} == set(done)
        assert all(one.said.endswith(f" {one.setting}") for one in found)
        kind = "policies" if isinstance(done[0], str) else "cliffs"
        assert all(one.said.startswith(f"asking, {kind} {done[0]}") for one in found)
    last = steps[-1][1]
    assert sorted(one.question_id for one in last) == sorted(q.id for q in beside.questions)


def test_policies_are_timed_beside_the_cliffs(
    monkeypatch: pytest.MonkeyPatch, beside: Results
) -> None:
    def generate(prompts: Any, setting: Any, use_tqdm: bool) -> list[Any]:
        took = 3.0 if setting == LAYERS else 2.0 if isinstance(setting, int) else 1.5
        return [SimpleNamespace(metrics=SimpleNamespace(scheduled_ts=0.0, first_token_ts=took))]

    monkeypatch.setattr(Asker, "sampling", lambda self, setting, tokens: setting)
    found = asker(SimpleNamespace(generate=generate)).time_prefill(beside.questions[:2], CLIFFS, 2)
    assert found == (
        {LAYERS: [1.0, 1.0]}
        | {cliff: [1.5, 1.5] for cliff in CLIFFS[:-1]}
        | {name: [2.0, 2.0] for name in POLICIES}
    )


def test_what_an_engine_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusedRequest(ValueError):
        pass

    def raising(error: Exception) -> Any:
        def generate(*_: Any, **__: Any) -> None:
            raise error

        return SimpleNamespace(generate=generate)

    front_end = SimpleNamespace(RefusedRequest=RefusedRequest)
    monkeypatch.setitem(sys.modules, "vllm_flow.engine.frontend", front_end)
    with pytest.raises(Refused, match="--policies: no attention here"):
        asker(raising(RefusedRequest("no attention here"))).generate([], None)
    with pytest.raises(ValueError, match="a fault") as caught:
        asker(raising(ValueError("a fault"))).generate([], None)
    assert not isinstance(caught.value, Refused)


# What a row says


@pytest.mark.parametrize("cliff", CLIFFS[:-1])
def test_a_policy_that_is_a_cliff_has_the_cliffs_row(alone: Results, cliff: int) -> None:
    again = [
        dataclasses.replace(one, cliff=None, policy="same")
        for one in alone.answers
        if one.cliff == cliff
    ]
    speedups: dict[int | str, list[float]] = {cliff: [1.5, 1.6], "same": [1.5, 1.6]}
    policies = {"unasked": POLICIES["fastv"], "same": FlowPolicy.withdrawal(cliff)}
    results = summarise(ENGINE, alone.questions, [*alone.answers, *again], speedups, policies)
    (row,) = results.policies
    (expected,) = (one for one in results.rows if one.cliff == cliff)
    assert (row.setting, row.layers) == ("same", cliff)
    assert dataclasses.replace(row, cliff=cliff, policy=None, stages=None) == expected
    assert [one.cliff for one in results.rows] == list(CLIFFS)


def test_rows_at_cliffs_are_the_same_with_policies_beside_them(
    alone: Results, beside: Results
) -> None:
    policies = {one.setting for one in beside.policies}
    assert policies == set(POLICIES)
    without = [one for one in beside.answers if one.setting not in policies]
    again = summarise(ENGINE, beside.questions, without, {})
    assert again.policies == [] == alone.policies
    assert again.rows == [dataclasses.replace(row, speedup=None) for row in beside.rows]


ranked = st.builds(
    Stage,
    st.integers(1, LAYERS - 1),
    st.one_of(st.integers(1, 200), st.fractions(Fraction(1, 9), Fraction(8, 9), max_denominator=9)),
    st.sampled_from(["uniform", "random", "diversity", "last_prompt"]),
)
policies = st.one_of(
    st.builds(FlowPolicy.withdrawal, st.integers(0, LAYERS - 1)),
    st.builds(lambda stage: FlowPolicy(((stage,),)), ranked),
    st.builds(
        lambda stage, more: FlowPolicy(((stage, Stage(min(stage.layer + more, LAYERS - 1))),)),
        ranked.filter(lambda stage: stage.layer < LAYERS - 1),
        st.integers(1, LAYERS),
    ),
)
prompts = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 300)), min_size=1, max_size=4)


@given(policies, prompts)
def test_the_cliff_of_equal_cost_has_the_ideal_of_the_policy(
    policy: FlowPolicy, sizes: list[tuple[int, int]]
) -> None:
    answers = [answer(text + image, image, "x") for text, image in sizes]
    layers = layers_that_see(ENGINE, policy, answers)
    assert 0 <= layers <= LAYERS
    if policy.only_withdraws:
        assert layers == policy.images[0][0].layer
    equal: Any = layers  # between two cliffs as well
    assert ideal_speedup(ENGINE, policy, answers) == pytest.approx(
        row_count_ideal(
            num_layers=LAYERS,
            cliff=equal,
            prompt_tokens=sum(one.prompt_tokens for one in answers),
            image_tokens=sum(one.image_tokens for one in answers),
        )
    )
    late = dataclasses.replace(policy, when="decode")
    assert layers_that_see(ENGINE, late, answers) == LAYERS
    assert ideal_speedup(ENGINE, late, answers) == 1


@given(st.integers(0, LAYERS), prompts, st.sampled_from([1.0, 0.25]))
def test_a_cliffs_ideal_is_the_row_count_ideal(
    cliff: int, sizes: list[tuple[int, int]], share: float
) -> None:
    engine = dataclasses.replace(ENGINE, key_share=share)
    answers = [answer(text + image, image, cliff=cliff) for text, image in sizes]
    expected = row_count_ideal(
        num_layers=LAYERS,
        cliff=cliff,
        prompt_tokens=sum(one.prompt_tokens for one in answers),
        image_tokens=sum(one.image_tokens for one in answers),
        key_share=share,
    )
    assert ideal_speedup(engine, cliff, answers) == pytest.approx(expected)
    flow = FlowPolicy.withdrawal(cliff) if cliff < LAYERS else None
    assert ideal_speedup(engine, flow, answers) == ideal_speedup(engine, cliff, answers)


@given(policies, st.integers(1, 60), st.integers(1, 300), st.booleans())
def test_blocks_are_predicted_layer_by_layer(
    policy: FlowPolicy, text: int, image: int, late: bool
) -> None:
    """By hand: each storage group holds what its shallowest layer keeps, once the answer is begun."""
    given_answer = answer(text + image, image, "x")
    if late:
        policy = dataclasses.replace(policy, when="decode")
    expected = tuple(
        -(-(given_answer.computed_tokens - image + policy.kept(start, 0, image)) // 32)
        for start in ENGINE.group_starts
    )
    assert predicted_blocks(given_answer, ENGINE, policy) == expected


# How it is shown


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
