"""Policies: what is accepted, what is refused, and what the refusal says."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.any_policy import LAYERS, policies
from vllm_flow.policy import WHOLE, FlowPolicy, Stage
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy, policy_label, request_keys
from vllm_flow.ranks import RANKS


@given(st.integers(0, LAYERS - 1))
def test_a_cliff_round_trips_through_its_request_keys(cliff: int) -> None:
    policy = parse_policy({"flow_cliff": cliff}, LAYERS)
    assert policy == FlowPolicy.withdrawal(cliff)
    assert parse_policy(request_keys(policy), LAYERS) == policy


@pytest.mark.parametrize("keys", [None, {}, {"flow_cliff": LAYERS}, {"kv_transfer_params": {}}])
def test_the_baseline_is_no_policy(keys: dict | None) -> None:
    assert parse_policy(keys, LAYERS) is None


def test_keys_that_are_no_text_are_nobodys_of_ours() -> None:
    assert parse_policy({7: "flow_cliff", None: 3, ("flow_cliff",): 3}, LAYERS) is None  # type: ignore[dict-item]


def test_keys_of_others_are_left_alone() -> None:
    assert parse_policy(
        {"flowers": 3, "other": "x", "flow_cliff": 1}, LAYERS
    ) == FlowPolicy.withdrawal(1)
    for key in (
        "keep",
        "rank",
        "flow",
        "flow rate",
        "workflow_seed",
        "low_rank",
        "x.flow_cliff",
        "流",
    ):
        assert parse_policy({key: 3}, LAYERS) is None


NOT_A_LAYER = st.one_of(
    st.integers(max_value=-1),
    st.integers(min_value=LAYERS + 1),
    st.booleans(),
    st.floats(),
    st.text(),
    st.none(),
    st.dictionaries(st.text(), st.integers()),
)


@given(NOT_A_LAYER)
def test_a_bad_cliff_is_refused_by_name(value: object) -> None:
    with pytest.raises(PolicyError) as error:
        parse_policy({"flow_cliff": value}, LAYERS)
    message = str(error.value)
    assert message.startswith("flow_cliff=") and "from 0" in message and str(LAYERS) in message
    assert len(message) < 400


def test_an_enormous_integer_is_refused_without_being_printed() -> None:
    with pytest.raises(PolicyError, match="integer of 100001 bits"):
        parse_policy({"flow_cliff": 1 << 100_000}, LAYERS)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("flow_clif", "did you mean 'flow_cliff'"),
        ("flow_temperature", "known keys: 'flow_cliff'"),
        ("FLOW_CLIFF", "did you mean 'flow_cliff'"),
        ("Flow_Temperature", "known keys: 'flow_cliff'"),
        ("flow-cliff", "did you mean 'flow_cliff'"),
        ("flowLogAttention", "did you mean 'flow_log_attention'"),
        (" flow_keep", "did you mean 'flow_keep'"),
        ("cliff", "did you mean 'flow_cliff'"),
        ("Cliff", "did you mean 'flow_cliff'"),
        ("vllm_flow_cliff", "did you mean 'flow_cliff'"),
        ("vllm_flow", "known keys: 'flow_cliff'"),
        ("fl\u200bow_cliff", "did you mean 'flow_cliff'"),
        ("ｆｌｏｗ_cliff", "did you mean 'flow_cliff'"),
    ],
)
def test_an_unknown_flow_key_is_refused_with_a_hint(key: str, hint: str) -> None:
    with pytest.raises(PolicyError, match=hint):
        parse_policy({key: 1}, LAYERS)
    assert issubclass(PolicyError, ValueError)


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_whatever_a_key_holds_its_refusal_can_be_sent_and_logged(rest: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse_policy({f"flow_?{rest}": 1}, LAYERS)
    for said in (str(error.value), error.value.key):
        said.encode()
        assert said.isprintable() and said.lstrip("'\"").startswith("flow_?")
    with pytest.raises(PolicyError) as error:
        parse_policy({"flow_" + "x" * 100_000: 1}, LAYERS)
    assert len(str(error.value)) < 500


@given(policies())
def test_every_policy_round_trips_through_its_request_keys(policy: FlowPolicy) -> None:
    assert parse_policy(request_keys(policy), LAYERS) == policy


@pytest.mark.parametrize(
    "keys",
    [
        {"flow_cliff": 3},
        {"flow_cliff": 3, "flow_when": "decode"},
        {"flow_cliff": [3, LAYERS]},
        {"flow_cliff": 3, "flow_keep": 64, "flow_rank": "uniform"},
        {"flow_cliff": [3, 5], "flow_keep": [64, "12.5%"], "flow_rank": "diversity"},
        {"flow_stages": "0:100% random, 2:71/144 random, 5:0", "flow_seed": 7},
    ],
)
def test_a_policy_goes_on_in_the_keys_that_it_came_in(keys: dict) -> None:
    """No key beside them, and numbers as numbers."""
    policy = parse_policy(keys, LAYERS)
    assert policy is not None and request_keys(policy) == keys


@given(policies(), policies())
def test_policies_that_differ_are_written_differently(one: FlowPolicy, other: FlowPolicy) -> None:
    assert (str(one) == str(other)) == (one == other)


@given(policies(), st.integers(1, 3000))
def test_what_is_kept_never_grows_with_depth(policy: FlowPolicy, total: int) -> None:
    for image in range(len(policy.images)):
        kept = [policy.kept(layer, image, total) for layer in range(LAYERS)]
        assert kept == sorted(kept, reverse=True) and kept[-1] >= 0 and kept[0] <= total


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ({"flow_stages": "0:284 diversity, 20:0"}, (Stage(0, 284, "diversity"), Stage(20))),
        ({"flow_stages": "2:50%  last_prompt"}, (Stage(2, Fraction(1, 2), "last_prompt"),)),
        ({"flow_stages": " 4:0 "}, (Stage(4),)),
        ({"flow_stages": "4:33.3% uniform, 32:0"}, (Stage(4, Fraction(333, 1000), "uniform"),)),
        ({"flow_stages": "4:64 uniform,9:1/9 random"}, (
            Stage(4, 64, "uniform"),
            Stage(9, Fraction(1, 9), "random"),
        )),
        ({"flow_stages": "4:100% uniform, 9:1 random"}, (
            Stage(4, WHOLE, "uniform"),
            Stage(9, 1, "random"),
        )),
        ({"flow_cliff": 7, "flow_keep": "144", "flow_rank": "last_image"}, (
            Stage(7, 144, "last_image"),
        )),
    ],
)  # fmt: skip
def test_how_stages_are_written(keys: dict, stages: tuple[Stage, ...]) -> None:
    policy = parse_policy(keys, LAYERS)
    assert policy is not None and policy.images == (stages,)


def test_lists_are_image_by_image() -> None:
    policy = parse_policy(
        {"flow_cliff": [3, LAYERS], "flow_keep": ["50%", 0], "flow_rank": "uniform"}, LAYERS
    )
    assert policy is not None and not policy.shared
    assert [policy.kept(5, image, 9) for image in (0, 1)] == [4, 9]
    scalar = parse_policy({"flow_cliff": 3, "flow_keep": [5, 0], "flow_rank": "uniform"}, LAYERS)
    assert scalar is not None
    assert [str(stage) for (stage,) in scalar.images] == ["3:5 uniform", "3:0"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"flow_cliff": 4, "flow_stages": "4:0"}, "flow_cliff=4: flow_stages is there as well"),
        ({"flow_preset": "fastv", "flow_cliff": 4}, "send one of them"),
        (
            {"flow_stages": "0:50% uniform, 2:9 cls_diverse"},
            "layer 2 some may be gone; make it the",
        ),
        ({"flow_preset": "fatv"}, "did you mean 'fastv'"),
        ({"flow_preset": "fastv", "flow_keep": 3}, "flow_preset settles it"),
        ({"flow_stages": "4:0", "flow_keep": 3}, "write it into flow_stages"),
        ({"flow_keep": 3}, "send flow_cliff too"),
        ({"flow_when": "decode"}, "send flow_cliff too"),
        ({"flow_cliff": 4, "flow_when": "later"}, "known: 'prefill', 'decode'"),
        (
            {"flow_stages": "2:9 uniform, 4:3 last_image", "flow_when": "decode"},
            "'last_image' chooses while the image is computed",
        ),
        ({"flow_cliff": 4, "flow_keep": 3}, "send flow_rank too"),
        ({"flow_cliff": 4, "flow_rank": "uniform"}, "no token is kept"),
        ({"flow_cliff": 4, "flow_keep": 0, "flow_rank": "uniform"}, "no token is kept"),
        ({"flow_cliff": 4, "flow_keep": -3, "flow_rank": "uniform"}, "a number of tokens such as"),
        ({"flow_cliff": 4, "flow_keep": True, "flow_rank": "uniform"}, "a number of tokens"),
        ({"flow_cliff": 4, "flow_keep": "120%", "flow_rank": "uniform"}, "share is too large"),
        ({"flow_cliff": 4, "flow_keep": "1/0", "flow_rank": "uniform"}, "a number of tokens"),
        ({"flow_cliff": 4, "flow_keep": 0.25, "flow_rank": "uniform"}, 'is exact: "25%"'),
        ({"flow_cliff": 4, "flow_keep": 1 << 40, "flow_rank": "uniform"}, "no image has so many"),
        ({"flow_cliff": 4, "flow_keep": 3, "flow_rank": "unifrm"}, "did you mean 'uniform'"),
        (
            {"flow_cliff": 0, "flow_keep": 3, "flow_rank": "last_image"},
            "no layer is before layer 0",
        ),
        ({"flow_cliff": 4, "flow_seed": 1}, "nothing is drawn"),
        (
            {"flow_cliff": 4, "flow_keep": 3, "flow_rank": "random", "flow_seed": 2**32},
            "from 0 to 4294967295",
        ),
        ({"flow_cliff": [1, "x"]}, "flow_cliff=[1, 'x']: in the list, a string is not a layer"),
        ({"flow_cliff": []}, "one value per image"),
        ({"flow_cliff": [1, 2], "flow_keep": [0, 0, 0]}, "it has 3 values and flow_cliff has 2"),
        ({"flow_cliff": [1, 2], "flow_keep": [0]}, "it has 1 value and flow_cliff has 2"),
        ({"flow_stages": ""}, "is no stage; write stages as"),
        ({"flow_stages": 4}, "write stages as"),
        ({"flow_stages": "4:0," * 600}, "write stages as"),
        ({"flow_stages": "40:0"}, "flow_stages=40: there is no such layer"),
        ({"flow_stages": "4:50%"}, "name a rank after it: 'uniform'"),
        ({"flow_stages": "4:0 uniform"}, "keeps nothing that could be ranked"),
        ({"flow_stages": "0:3 last_prompt"}, "no layer is before layer 0"),
        ({"flow_stages": "9:3 uniform, 4:0"}, "layer 4 comes after layer 9"),
        ({"flow_stages": "4:3 uniform, 9:4 uniform"}, "do not come back"),
        ({"flow_stages": "4:0, 9:0"}, "leaves nothing for"),
        ({"flow_stages": "4:10% uniform, 9:20% uniform"}, "do not come back"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(keys: dict, said: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse_policy(keys, LAYERS)
    assert said in str(error.value)
    assert len(str(error.value)) < 500


@given(st.dictionaries(
    st.sampled_from(["flow_cliff", "flow_keep", "flow_rank", "flow_stages", "flow_seed", "flow_when"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
        | st.from_regex(r"[0-9:%, a-z]{0,30}", fullmatch=True),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
))  # fmt: skip
def test_whatever_is_sent_is_a_policy_or_a_refusal(keys: dict) -> None:
    try:
        policy = parse_policy(keys, LAYERS)
    except PolicyError as error:
        assert error.key in keys
    else:
        assert policy is None or parse_policy(request_keys(policy), LAYERS) == policy


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        (None, "baseline"),
        ({"flow_log_attention": True}, "baseline"),
        ({"flow_cliff": 4}, "cliff=4"),
        ({"flow_cliff": 4, "flow_when": "decode"}, "cliff=4 when=decode"),
        ({"flow_stages": "4:0", "flow_when": "decode"}, "cliffs when=decode"),
        ({"flow_cliff": [4, 5]}, "cliffs"),
        ({"flow_stages": "4:0"}, "cliffs"),
        ({"flow_cliff": 4, "flow_keep": "25%", "flow_rank": "random", "flow_seed": 77}, "ranks=random"),
        ({"flow_stages": "2:50% last_prompt, 9:3 uniform, 12:0"}, "ranks=uniform+last_prompt"),
        ({"flow_stages": "1:9 random, 2:5 uniform, 3:3 last_prompt"}, "ranks=several"),
    ],
)  # fmt: skip
def test_metrics_have_names_for_policies(keys: dict | None, label: str) -> None:
    assert policy_label(keys) == label


def test_metrics_have_few_names_whatever_clients_choose() -> None:
    names = list(RANKS)
    stages = [
        ", ".join(f"{layer}:{99 - layer} {rank}" for layer, rank in enumerate(chosen))
        for count in range(1, 5)
        for chosen in itertools.combinations(names, count)
    ]
    labels = {policy_label({"flow_stages": text}) for text in stages}
    assert len(labels) == len(names) * (len(names) + 1) // 2 + 1 < len(stages) / 5
