"""What an operator's default and bound make of a request, in view of its pictures."""

from __future__ import annotations

import pytest

from tests.engine.test_fitting import LAYERS, settle
from vllm_flow.cliff_file import Profile
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy


def test_a_default_policy_stays_away_from_what_it_does_not_fit() -> None:
    default = parse_policy({"flow_cliff": 3, "flow_keep": 9, "flow_rank": "last_image"}, LAYERS)
    keys, salt = settle(None, (5, 90), default_policy=default, step_tokens=90)
    assert keys == {"flow_cliff": 3, "flow_keep": 9, "flow_rank": "last_image"} and salt
    assert settle(None, (5, 90), default_policy=default, step_tokens=80) == (None, None)
    # A client opts out by any form of the baseline.
    assert settle({"flow_cliff": LAYERS}, (5, 90), default_policy=default) == (None, None)
    assert settle({"flow_stages": "31:0"}, (5, 90), default_policy=default)[0] == {"flow_cliff": 31}


def test_a_default_policy_stays_away_from_pictures_of_which_it_evicts_more_than_is_allowed() -> (
    None
):
    default = parse_policy({"flow_stages": "4:50% uniform"}, LAYERS)
    bounds = {"max_policy": parse_policy({"flow_stages": "4:25 uniform"}, LAYERS)}
    assert settle(None, (5, 50), default_policy=default, **bounds)[1] is not None
    assert settle(None, (5, 49), default_policy=default, **bounds) == (None, None)
    profile = Profile({"a": default}, None)
    assert settle({"flow_task": "a"}, (5, 50), profile=profile, **bounds)[1] is not None
    assert settle({"flow_task": "a"}, (5, 49), profile=profile, **bounds) == (None, None)


def test_the_most_that_is_allowed_depends_on_the_picture() -> None:
    most = parse_policy({"flow_stages": "4:25 uniform, 20:0"}, LAYERS)
    keys = {"flow_stages": "4:50% uniform"}
    assert settle(keys, (5, 50), max_policy=most)[1] is not None
    with pytest.raises(PolicyError, match="from layer 4 on than the operator"):
        settle(keys, (5, 49), max_policy=most)
    assert settle({"flow_cliff": 20}, (5, 49), max_policy=most)[1] is not None
    with pytest.raises(PolicyError, match="from layer 19 on"):
        settle({"flow_cliff": 19}, (5, 49), max_policy=most)


def test_an_operator_may_allow_eviction_after_the_prefill_alone() -> None:
    most = parse_policy({"flow_cliff": 3, "flow_when": "decode"}, LAYERS)
    late = {"flow_cliff": 4, "flow_when": "decode"}
    assert settle(late, (5, 90), max_policy=most)[0] == late
    with pytest.raises(PolicyError, match="flow_when='prefill': .*send \"decode\""):
        settle({"flow_cliff": 9}, (5, 90), max_policy=most)
    with pytest.raises(PolicyError, match="flow_cliff=2: the operator"):
        settle({**late, "flow_cliff": 2}, (5, 90), max_policy=most)
    assert settle(None, (5, 90), default_policy=most) == (
        {"flow_cliff": 3, "flow_when": "decode"},
        None,
    )
