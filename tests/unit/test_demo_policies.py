"""Policies beside the demo's cliffs: what is asked and sent, and what a row says of them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.synthetic import ENGINE, POLICIES
from tests.unit.synthetic import FEW_CLIFFS as CLIFFS
from vllm_flow.demo.command import add_arguments, settings_of
from vllm_flow.demo.measurements import Answer, Reading, Results
from vllm_flow.demo.policies import read_policies
from vllm_flow.demo.rows import ideal_speedup, layers_that_see, predicted_blocks, summarise
from vllm_flow.demo.serving import Asker, mixtures
from vllm_flow.eval.sweep.policies import PolicySpecError
from vllm_flow.exits import Refused
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.policy_keys import parse_policy
from vllm_flow.profile.ideal import row_count_ideal

LAYERS = ENGINE.num_layers


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
    monkeypatch.setitem(sys.modules, "vllm_flow.engine.front_end.incoming", front_end)
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
