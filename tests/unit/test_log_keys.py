"""The attention log's keys: what is accepted, what is refused, and what the refusal says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.log_keys import AttentionLog, parse_log
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy

LAYERS = 32

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
    assert parse_policy(keys, LAYERS) == FlowPolicy.withdrawal(3)


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
        ({"flow_log_attention_heat": True}, "heat=true: .* send flow_log_attention too"),
        (
            {"flow_log_attention": False, "flow_log_attention_heat": 1},
            "heat=1: .* send flow_log_attention too",
        ),
        ({"flow_log_attention": 1, "flow_log_attention_heat": 2}, "heat=2: it must be true or"),
        ({"flow_log_attention": [4, 4]}, r"=\[4, 4\]: a layer is named twice"),
        ({"flow_log_attention": [32]}, r"=\[32\]: there is no layer 32"),
        ({"flow_log_attention": [True]}, "true is not a layer"),
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


def test_every_layer_is_every_one_that_attends() -> None:
    attending = (3, 7, 11)
    assert parse_log({"flow_log_attention": True}, LAYERS, attending=attending) == AttentionLog(
        attending
    )
    some = parse_log({"flow_log_attention": [11, 3]}, LAYERS, attending=attending)
    assert some == AttentionLog((3, 11))
    with pytest.raises(PolicyError, match="layer 4 keeps no keys, .* attend are 3, 7, 11"):
        parse_log({"flow_log_attention": [3, 4]}, LAYERS, attending=attending)
