"""What an operator allows, as far as it can be told without a prompt, and in which words it is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.any_policy import LAYERS, policies
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import FlowPolicy, Stage, first_layer_beyond
from vllm_flow.policy_bounds import admit, check_bound, contradicts, operators_policy
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy

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
    assert admit(None, LAYERS, allowed=False, bound=SOME) is None


@pytest.mark.parametrize(
    "keys", [{"flow_cliff": 32}, {"flow_preset": "vtw"}, {"flow_stages": "4:0"}], ids=str
)
def test_where_the_operator_decides_any_policy_is_refused(keys: dict[str, object]) -> None:
    """The baseline, too, which is a policy that a request sends."""
    with pytest.raises(PolicyError, match="the operator of this server sets the policy") as error:
        admit(keys, LAYERS, allowed=False)
    assert error.value.key in keys


@pytest.mark.parametrize(
    ("keys", "bound"),
    [
        ({"flow_cliff": 2}, SOME),
        ({"flow_stages": "1:1% uniform"}, FlowPolicy.withdrawal(5)),
        ({"flow_stages": "1:1% uniform"}, SOME),
    ],
)
def test_what_depends_on_the_picture_is_for_the_front_end(
    keys: dict[str, object], bound: FlowPolicy
) -> None:
    """A share of one token is none, and of a thousand some: the bound is compared once a picture is known."""
    policy = admit(keys, LAYERS, bound=bound)
    assert policy == parse_policy(keys, LAYERS) is not None
    with pytest.raises(PolicyError, match="the operator of this server"):
        check_bound(policy, bound, [576], LAYERS)


def test_a_cliff_is_bound_by_a_cliff_and_stages_by_stages() -> None:
    with pytest.raises(PolicyError) as error:
        admit({"flow_cliff": 3}, LAYERS, bound=FlowPolicy.withdrawal(4))
    assert str(error.value) == (
        "flow_cliff=3: the operator of this server allows layers from 4 on; it must be an integer from 4 to 32."
    )
    for keys, begins in (
        ({"flow_stages": "2:0"}, 2),
        ({"flow_preset": "vtw", "flow_when": "decode"}, 15),
    ):
        with pytest.raises(PolicyError) as error:
            admit(keys, LAYERS, bound=FlowPolicy.withdrawal(20))
        # What was sent is named, and not the cliff that says the same.
        key, value = next(iter(keys.items()))
        assert str(error.value) == (
            f"{key}={value!r}: the operator of this server allows layers from 20 on; this begins at layer {begins}; "
            "send stages that begin at 20 or deeper."
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


@pytest.mark.parametrize(
    "policy", [FlowPolicy(((Stage(2, 600, "uniform"),),)), FlowPolicy.withdrawal(LAYERS)], ids=str
)
def test_what_evicts_nothing_need_not_be_late(policy: FlowPolicy) -> None:
    """Of this picture all is kept, or for all of the model's layers."""
    late = FlowPolicy(((Stage(4),),), when="decode")
    check_bound(policy, late, [576], LAYERS)


@given(st.integers(0, LAYERS), st.none() | st.integers(0, LAYERS - 1), st.booleans())
def test_an_operator_bounds_what_requests_ask_for(
    cliff: int, lowest: int | None, allowed: bool
) -> None:
    bound = None if lowest is None else FlowPolicy.withdrawal(lowest)
    if allowed and (lowest is None or cliff >= lowest):
        expected = parse_policy({"flow_cliff": cliff}, LAYERS)
        found = admit({"flow_cliff": cliff}, LAYERS, allowed=allowed, bound=bound)
        assert found == expected
    else:
        with pytest.raises(PolicyError, match="the operator of this server"):
            admit({"flow_cliff": cliff}, LAYERS, allowed=allowed, bound=bound)
    assert admit({"other": 1}, LAYERS, allowed=allowed, bound=bound) is None


def test_a_bound_that_allows_nothing_is_one() -> None:
    """As a request's policy it would be none, and no bound would be the opposite of what was meant."""
    for keys in ({"flow_cliff": LAYERS}, {"flow_stages": f"{LAYERS}:0"}):
        bound = FlowSettings.read({"max_policy": keys}, EngineFacts(LAYERS)).max_policy
        with pytest.raises(PolicyError, match=f"from {LAYERS} to {LAYERS}"):
            admit({"flow_cliff": LAYERS - 1}, LAYERS, bound=bound)
        assert admit({"flow_cliff": LAYERS}, LAYERS, bound=bound) is None
    assert FlowSettings.read({}, EngineFacts(LAYERS)).max_policy is None


@given(policies(), policies(), st.lists(st.integers(1, 800), min_size=4, max_size=4))
def test_a_bound_compares_layer_by_layer(
    policy: FlowPolicy, bound: FlowPolicy, totals: list[int]
) -> None:
    images = [
        image
        for image in range(4)
        if all(p.shared or image < len(p.images) for p in (policy, bound))
    ]
    beyond = [
        layer
        for layer in range(LAYERS + 1)
        if any(policy.kept(layer, i, totals[i]) < bound.kept(layer, i, totals[i]) for i in images)
    ]
    found = first_layer_beyond(policy, bound, totals[: len(images)])
    assert found == min(beyond, default=None)
    evicts = any(
        policy.kept(layer, i, totals[i]) < totals[i] for layer in range(LAYERS) for i in images
    )
    early = evicts and (policy.when, bound.when) == ("prefill", "decode")
    if found is None and not early:
        check_bound(policy, bound, totals[: len(images)], LAYERS)
    else:
        with pytest.raises(PolicyError, match="the operator of this server allows"):
            check_bound(policy, bound, totals[: len(images)], LAYERS)


def test_an_operators_policy_is_for_any_number_of_images() -> None:
    assert operators_policy({"flow_cliff": 4}, LAYERS) == FlowPolicy.withdrawal(4)
    for keys, said in (
        ({"flow_cliff": 4, "flow_keep": [1, 2], "flow_rank": "uniform"}, "flow_keep"),
        ({"flow_cliff": [4, 5], "flow_keep": 1, "flow_rank": "uniform"}, "flow_cliff"),
    ):
        with pytest.raises(PolicyError, match="any number of images") as error:
            operators_policy(keys, LAYERS)
        assert error.value.key == said


@pytest.mark.parametrize("cliffs", [[2, 10], [10, 2]], ids=str)
def test_a_cliff_of_any_image_is_bound(cliffs: list[int]) -> None:
    with pytest.raises(PolicyError, match="allows layers from 5 on"):
        admit({"flow_cliff": cliffs}, LAYERS, bound=FlowPolicy.withdrawal(5))


@pytest.mark.parametrize(
    ("keep", "most", "expected"),
    [
        (100, Fraction(1, 2), True),
        (300, Fraction(1, 2), False),  # of 512 tokens that is more, and of 256 it is all
        (Fraction(2, 5), 20000, True),
        (Fraction(7, 10), 20000, False),  # of a picture of 32768 tokens that is more
        (300, 20000, True),  # from 256 tokens it evicts none
        (40000, 50000, False),  # nor from any
    ],
)
def test_a_policy_contradicts_a_bound_that_it_breaks_with_every_picture(
    keep: int | Fraction, most: int | Fraction, expected: bool
) -> None:
    policy, bound = (FlowPolicy(((Stage(2, kept, "uniform"),),)) for kept in (keep, most))
    assert contradicts(policy, bound, LAYERS) == expected
