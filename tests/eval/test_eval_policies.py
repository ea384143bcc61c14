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
from vllm_flow.eval.sweep.policy import policy_of, presets_of
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.policy_keys import parse_policy
from vllm_flow.presets import PRESETS
from vllm_flow.ranks import RANKS

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
    gone = [FlowPolicy.withdrawal(cliff) for cliff in (16, 0)]
    assert [p.flow() for p in policies] == [None, *gone, None], "a reduced picture loses no token"
    assert Policy.from_json({"name": "of a damaged record", "kind": "cliff"}).flow() is None
    assert policy_of(FlowPolicy.withdrawal(32), 32) == BASELINE


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
    spec = f"cliff=0:{num_layers},downsample={cliff},downsample={cliff}x{cliff}"
    for policy in parse_policies(spec, num_layers):
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
    for grid, layer in ((full, 0), (full, num_layers + 1), (0, cliff)):
        with pytest.raises(ValueError, match=f"no budget: full_grid={grid}, cliff={layer}"):
            grid_of_budget(grid, layer, num_layers)


def test_stages_presets_seeds_and_when() -> None:
    """Two spellings of one request are one policy; its keys are what a client sends."""
    policies = parse_policies(
        "fastv, 2:50%  last_prompt,2:1/2 last_prompt ;32:0, 0:64 random seed=1:2,0:284 diversity; 20:0,"
        "cliff=4 when=decode,vtw,cliff=15,10:0,0:0,5:100% uniform;30:0,0:50% uniform;4:50% random seed=7",
        32,
    )
    assert {policy.name: policy.request_keys() for policy in policies} == {
        "2:50% last_prompt": {"flow_cliff": 2, "flow_keep": "50%", "flow_rank": "last_prompt"},
        "0:64 random seed=1": {"flow_cliff": 0, "flow_keep": 64, "flow_rank": "random", "flow_seed": 1},
        "0:64 random seed=2": {"flow_cliff": 0, "flow_keep": 64, "flow_rank": "random", "flow_seed": 2},
        "0:284 diversity;20:0": {"flow_stages": "0:284 diversity, 20:0"},
        "cliff=4 when=decode": {"flow_cliff": 4, "flow_when": "decode"},
        "cliff=15": {"flow_cliff": 15},
        "cliff=10": {"flow_cliff": 10},
        "text-only": {"flow_cliff": 0},
        "cliff=30": {"flow_cliff": 30},
        "0:50% uniform": {"flow_cliff": 0, "flow_keep": "50%", "flow_rank": "uniform"},
    }  # fmt: skip
    assert presets_of(policies[0].flow() or FlowPolicy.withdrawal(0), 32) == ("fastv",)


def test_a_budget_is_methods_of_equal_cost() -> None:
    assert names_at("budget=192", 32, 24) == [
        "10:384 uniform;11:0", "0:192 uniform", "0:192 random", "0:192 random seed=1",
        "0:192 random seed=2", "0:192 diversity", "downsample=13x13", "downsample=14x14",
    ]  # fmt: skip
    assert names_at("budget=50% cliff last_prompt", 32, None) == ["cliff=16", "2:7/15 last_prompt"]
    # Without a square of patches nothing is reduced; asked for, it is refused.
    assert "downsample=4x4" not in names_at("budget=1/9", 30, None)
    assert names_at("budget=1/9 downsample,downsample=3", 30, 12) == ["downsample=4x4"]


def names_at(spec: str, num_layers: int, full_grid: int | None) -> list[str]:
    return [policy.name for policy in parse_policies(spec, num_layers, full_grid)]


keeps = st.one_of(st.integers(1, 600), st.fractions("1/100", "99/100", max_denominator=200))


@given(
    layer_counts,
    st.lists(st.tuples(st.integers(1, 79), keeps, st.sampled_from(sorted(RANKS))), max_size=3),
    st.integers(0, 3),
    st.sampled_from(["prefill", "decode"]),
)
def test_any_stages_have_one_name_that_reads_back(
    num_layers: int, drawn: list[tuple[int, object, str]], seed: int, when: str
) -> None:
    stages = sorted((Stage(*one) for one in drawn), key=lambda stage: stage.layer)
    try:
        keys = {"flow_stages": ", ".join(map(str, stages)), "flow_when": when}
        if any(RANKS[stage.rank].draws for stage in stages if stage.rank):
            keys["flow_seed"] = seed
        flow = parse_policy(keys, num_layers)
    except ValueError:
        return  # keeps that grow, two stages at a layer, layers that the model does not have
    policy = policy_of(flow, num_layers)
    assert parse_policies(policy.name, num_layers) == (policy,)
    assert Policy.from_json(policy.as_json()) == policy
    assert policy_of(policy.flow(), num_layers) == policy
    read = parse_policy(policy.request_keys(), num_layers)
    for layer in range(num_layers):
        wanted = 144 if flow is None else flow.kept(layer, 0, 144)
        assert wanted == (144 if read is None else read.kept(layer, 0, 144))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_found_again_by_its_stages(name: str) -> None:
    (policy,) = parse_policies(name, 32)
    flow = policy.flow()
    assert flow is not None and name in presets_of(flow, 32)
    assert parse_policies(f"{policy.name},{name}", 32) == (policy,)


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
        ("downsample=3x4", "a square of patches"),
        ("downsample=٣x٣", "write downsample=16"),
        ("downsample=3 seed=1", "seed has no meaning here"),
        ("baseline when=decode", "when has no meaning here"),
        ("fastw", "did you mean 'fastv'"),
        ("fastv seed=1", "flow_preset settles it"),
        ("2:50%", "does not say which"),
        ("2:50% lastprompt", "did you mean 'last_prompt'"),
        ("0:50% last_prompt", "no layer is before layer 0"),
        ("0:64 uniform seed=2", "nothing is drawn"),
        ("0:64 random seed=x", "write seed=3"),
        ("0:64 random seed=4:1", "write seed=3"),
        ("0:64 random seed=0:999", "at most 100 seeds"),
        ("0:64 random seed=1 seed=2", "seed is there twice"),
        ("cliff=3 when=later", "there is no such value"),
        ("budget", "it must be a number of tokens"),
        ("budget=100%", "write a budget between"),
        ("budget=64", "write a share such as 33%"),
        ("budget=50% magic", "is no method"),
        (f"budget=50% {'uniform ' * 40}magic", "'magic' is no method"),
        ("budget=50% uniform seed=3", "nothing is drawn"),
        ("budget=50% downsample", "cannot be reduced"),
        ("budget=1/32 last_prompt", "leave last_prompt out"),
    ],
)
def test_what_is_refused_and_how(spec: str, says: str) -> None:
    with pytest.raises(PolicySpecError) as refused:
        parse_policies(spec, 32)
    assert says in str(refused.value)


@pytest.mark.parametrize(("grid", "says"), [(12, "from 1x1 to 12x12."), (None, "from 1x1.")])
def test_a_square_is_no_larger_than_the_picture(grid: int | None, says: str) -> None:
    with pytest.raises(PolicySpecError, match=f"a square of patches, {says}$"):
        parse_policies("downsample=0x0", 32, grid)
    if grid:
        assert names_at("downsample=12x12", 32, grid) == ["downsample=12x12"]
        with pytest.raises(PolicySpecError, match=says):
            parse_policies("downsample=13x13", 32, grid)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(spec: str) -> None:
    try:
        policies = parse_policies(spec, 8)
    except PolicySpecError:
        return
    assert policies and len({policy.name for policy in policies}) == len(policies)
