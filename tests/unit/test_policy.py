"""Policies: what is accepted, what is refused, and what the refusal says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.policy import (
    AttentionLog,
    FlowPolicy,
    PolicyError,
    admit,
    parse_log,
    parse_policy,
)

LAYERS = 32


@given(st.integers(0, LAYERS - 1))
def test_a_cliff_round_trips_through_its_request_keys(cliff: int) -> None:
    policy = parse_policy({"flow_cliff": cliff}, LAYERS)
    assert policy == FlowPolicy(cliff)
    assert parse_policy(policy.request_keys(), LAYERS) == policy


@pytest.mark.parametrize("keys", [None, {}, {"flow_cliff": LAYERS}, {"kv_transfer_params": {}}])
def test_the_baseline_is_no_policy(keys: dict | None) -> None:
    assert parse_policy(keys, LAYERS) is None


def test_keys_of_others_are_left_alone() -> None:
    assert parse_policy({"flowers": 3, "other": "x", "flow_cliff": 1}, LAYERS) == FlowPolicy(1)


NOT_A_LAYER = st.one_of(
    st.integers(max_value=-1),
    st.integers(min_value=LAYERS + 1),
    st.booleans(),
    st.floats(),
    st.text(),
    st.none(),
    st.lists(st.integers()),
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
    [("flow_clif", "did you mean 'flow_cliff'"), ("flow_temperature", "known keys: 'flow_cliff'")],
)
def test_an_unknown_flow_key_is_refused_with_a_hint(key: str, hint: str) -> None:
    with pytest.raises(PolicyError, match=hint):
        parse_policy({key: 1}, LAYERS)
    assert issubclass(PolicyError, ValueError)


@given(st.integers(0, LAYERS), st.none() | st.integers(0, LAYERS - 1), st.booleans())
def test_an_operator_bounds_what_requests_ask_for(
    cliff: int, strongest: int | None, allowed: bool
) -> None:
    bound = None if strongest is None else FlowPolicy(strongest)
    if allowed and (strongest is None or cliff >= strongest):
        expected = parse_policy({"flow_cliff": cliff}, LAYERS)
        found = admit({"flow_cliff": cliff}, LAYERS, allowed=allowed, strongest=bound)
        assert found == expected
    else:
        with pytest.raises(PolicyError, match="the operator of this server"):
            admit({"flow_cliff": cliff}, LAYERS, allowed=allowed, strongest=bound)
    assert admit({"other": 1}, LAYERS, allowed=allowed, strongest=bound) is None


@given(st.sets(st.integers(0, LAYERS - 1), min_size=1), st.booleans())
def test_a_log_round_trips_through_its_request_keys(layers: set[int], heat: bool) -> None:
    log = AttentionLog(tuple(sorted(layers)), heat)
    assert parse_log(log.request_keys(), LAYERS) == log
    assert parse_policy(log.request_keys(), LAYERS) is None


@pytest.mark.parametrize("true", [True, 1])
def test_true_logs_every_layer(true: object) -> None:
    """A JSON true in `vllm_xargs` reaches the engine as 1."""
    keys = {"flow_log_attention": true, "flow_log_attention_heat": true, "flow_cliff": 3}
    assert parse_log(keys, LAYERS) == AttentionLog(tuple(range(LAYERS)), heat=True)
    assert parse_policy(keys, LAYERS) == FlowPolicy(3)


@pytest.mark.parametrize(
    "keys",
    [None, {}, {"flow_cliff": 1}, {"flow_log_attention": False}, {"flow_log_attention": 0}]
    + [{"flow_log_attention": False, "flow_log_attention_heat": False}],
)
def test_nothing_is_logged_unasked(keys: dict | None) -> None:
    assert parse_log(keys, LAYERS, available=False) is None


LAYER = st.integers(0, LAYERS - 1)
NO_LOG = st.one_of(
    st.integers().filter(lambda value: value not in (0, 1)),
    st.floats(),
    st.text(),
    st.none(),
    st.just([]),
    st.lists(NOT_A_LAYER, min_size=1),
    st.lists(LAYER, min_size=1).map(lambda layers: [*layers, layers[0]]),
    st.dictionaries(st.text(), st.integers()),
)


@given(NO_LOG)
def test_a_bad_log_is_refused_by_name(value: object) -> None:
    with pytest.raises(PolicyError) as error:
        parse_log({"flow_log_attention": value}, LAYERS)
    message = str(error.value)
    assert message.startswith("flow_log_attention=") and f"from 0 to {LAYERS - 1}" in message
    assert len(message) < 800


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"flow_log_attention_heat": True}, "heat=True: .* send flow_log_attention too"),
        (
            {"flow_log_attention": False, "flow_log_attention_heat": 1},
            "heat=1: .* send flow_log_attention too",
        ),
        ({"flow_log_attention": 1, "flow_log_attention_heat": 2}, "heat=2: it must be true or"),
        ({"flow_log_attention": [4, 4]}, r"=\[4, 4\]: a layer is named twice"),
        ({"flow_log_attention": [32]}, r"=\[32\]: there is no layer 32"),
        ({"flow_log_attention": [True]}, "True is not a layer"),
        ({"flow_log_atention": True}, "did you mean 'flow_log_attention'"),
    ],
)
def test_what_is_wrong_with_a_log_is_said(keys: dict, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse_policy(keys, LAYERS)
        parse_log(keys, LAYERS)


def test_an_engine_without_a_log_says_how_to_get_one() -> None:
    with pytest.raises(PolicyError, match='"attention_log": "DIRECTORY"'):
        parse_log({"flow_log_attention": True}, LAYERS, available=False)
