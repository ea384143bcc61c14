"""Policy texts: what they mean, which are one and the same, and what is refused with which words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.eval.sweep.policies import (
    BASELINE,
    TEXT_ONLY,
    Policy,
    PolicySpecError,
    grid_of_budget,
    parse_policies,
)
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_keys import parse_policy

layer_counts = st.integers(1, 80)


def names(spec: str, num_layers: int = 32) -> list[str]:
    return [policy.name for policy in parse_policies(spec, num_layers)]


def test_every_kind() -> None:
    policies = parse_policies("baseline, cliff=16,text-only,downsample=16", 32)
    assert policies == (
        BASELINE,
        Policy("cliff=16", "cliff", 16),
        TEXT_ONLY,
        Policy("downsample=16", "downsample", 16),
    )
    assert [p.request_keys() for p in policies] == [{}, {"flow_cliff": 16}, {"flow_cliff": 0}, {}]
    assert [p.grid(24, 32) for p in policies] == [None, None, None, 17]


def test_ranges_include_both_ends() -> None:
    assert names("cliff=4:12:4") == ["cliff=4", "cliff=8", "cliff=12"]
    assert names("cliff=4:13:4") == ["cliff=4", "cliff=8", "cliff=12"]
    assert names("cliff=3:5") == ["cliff=3", "cliff=4", "cliff=5"]
    assert names("downsample=31:32") == ["downsample=31", "downsample=32"]


def test_one_request_has_one_name() -> None:
    assert names("cliff=0,text-only,cliff=32,baseline,cliff=8,cliff=8:8") == [
        "text-only",
        "baseline",
        "cliff=8",
    ]


@given(layer_counts.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_a_range_is_its_members(case: tuple[int, int, int]) -> None:
    num_layers, one, other = case
    first, last = sorted((one, other))
    listed = ",".join(f"cliff={cliff}" for cliff in range(first, last + 1))
    assert parse_policies(f"cliff={first}:{last}", num_layers) == parse_policies(listed, num_layers)


@given(layer_counts.flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_names_and_records_read_back(case: tuple[int, int]) -> None:
    num_layers, cliff = case
    for policy in parse_policies(f"cliff=0:{num_layers},downsample={cliff}", num_layers):
        assert parse_policies(policy.name, num_layers) == (policy,)
        assert Policy.from_json(policy.as_json() | {"of a later version": 1}) == policy


@given(layer_counts.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_the_engine_reads_the_keys_as_meant(case: tuple[int, int]) -> None:
    num_layers, cliff = case
    (policy,) = parse_policies(f"cliff={cliff}", num_layers)
    read = parse_policy(policy.request_keys(), num_layers)
    assert read == (None if cliff == num_layers else FlowPolicy.withdrawal(cliff))


@given(st.integers(1, 40), layer_counts.flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_the_grid_is_the_nearest_to_the_budget(full: int, case: tuple[int, int]) -> None:
    num_layers, cliff = case
    side = grid_of_budget(full, cliff, num_layers)
    budget = full * full * cliff / num_layers
    assert 1 <= side <= full
    assert side == 1 or abs(side - budget**0.5) <= 0.5 + 1e-9
    assert grid_of_budget(full, num_layers, num_layers) == full


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "no such policy"),
        ("baseline,", "no such policy"),
        ("clif=3", "did you mean 'cliff'"),
        ("text_only", "did you mean 'text-only'"),
        ("zzz", "known: baseline | cliff=N"),
        ("baseline=3", "takes no value"),
        ("text-only=", "takes no value"),
        ("cliff", "write cliff=16"),
        ("cliff=", "write cliff=16"),
        ("cliff=1_6", "write cliff=16"),
        ("cliff=-1", "write cliff=16"),
        ("cliff=1:2:3:4", "write cliff=16"),
        ("cliff=33", "from 0 to 32"),
        ("cliff=0:64:2", "from 0 to 32"),
        ("cliff=" + "9" * 5000, "32 decoder layers"),
        ("cliff=8:4", "write 4:8"),
        ("cliff=0:8:0", "at least 1"),
        ("downsample=0", "from 1 to 32"),
        ("downsample=x", "write downsample=16"),
    ],
)
def test_what_is_refused_and_how(spec: str, says: str) -> None:
    with pytest.raises(PolicySpecError) as refused:
        parse_policies(spec, 32)
    assert says in str(refused.value)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(spec: str) -> None:
    try:
        policies = parse_policies(spec, 8)
    except PolicySpecError:
        return
    assert policies and len({policy.name for policy in policies}) == len(policies)
