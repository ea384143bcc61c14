"""What an operator allows, as far as it can be told without a prompt, and in which words it is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest

from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.policy_bounds import admit, check_bound
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy

LAYERS = 32
SOME = FlowPolicy(((Stage(2, 64, "uniform"),),))
"""The operator wants 64 tokens kept."""


def test_without_bounds_any_request_is_admitted() -> None:
    for keys in (
        None,
        {},
        {"other": 1},
        {"flow_cliff": 0},
        {"flow_cliff": 4, "flow_when": "decode"},
    ):
        assert admit(keys, LAYERS) == parse_policy(keys, LAYERS)
    assert admit(None, LAYERS, allowed=False, strongest=SOME) is None


@pytest.mark.parametrize(
    "keys", [{"flow_cliff": 32}, {"flow_preset": "vtw"}, {"flow_stages": "4:0"}], ids=str
)
def test_where_the_operator_decides_any_policy_is_refused(keys: dict[str, object]) -> None:
    """The baseline, too, which is a policy that a request sends."""
    with pytest.raises(PolicyError, match="the operator of this server sets the policy") as error:
        admit(keys, LAYERS, allowed=False)
    assert error.value.key in keys


@pytest.mark.parametrize(
    ("keys", "strongest"),
    [
        ({"flow_cliff": 2}, SOME),
        ({"flow_stages": "1:1% uniform"}, FlowPolicy.withdrawal(5)),
        ({"flow_stages": "1:1% uniform"}, SOME),
    ],
)
def test_what_depends_on_the_picture_is_for_the_front_end(
    keys: dict[str, object], strongest: FlowPolicy
) -> None:
    """A share of one token is none, and of a thousand some: the bound is compared once a picture is known."""
    policy = admit(keys, LAYERS, strongest=strongest)
    assert policy == parse_policy(keys, LAYERS) is not None
    with pytest.raises(PolicyError, match="the operator of this server"):
        check_bound(policy, strongest, [576], LAYERS)


def test_a_cliff_is_bound_by_a_cliff_and_stages_by_stages() -> None:
    with pytest.raises(PolicyError) as error:
        admit({"flow_cliff": 3}, LAYERS, strongest=FlowPolicy.withdrawal(4))
    assert str(error.value) == (
        "flow_cliff=3: the operator of this server allows layers from 4 on; it must be an integer from 4 to 32."
    )
    half = FlowPolicy(((Stage(2, Fraction(1, 2), "uniform"), Stage(8, 0, None)),))
    with pytest.raises(
        PolicyError, match='evicts more from layer 5 on .* which is "2:50% uniform, 8:0"'
    ):
        check_bound(FlowPolicy.withdrawal(5), half, [576], LAYERS)
    with pytest.raises(
        PolicyError, match='flow_when=.prefill.: .* after the prefill; send "decode"'
    ):
        late = FlowPolicy(((Stage(4, 0, None),),), when="decode")
        check_bound(FlowPolicy.withdrawal(8), late, [576], LAYERS)
