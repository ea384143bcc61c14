"""Equal cost: every method spends a budget, none more, and each as much as whole tokens allow."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_flow.eval.sweep.budgets import (
    METHODS,
    BudgetError,
    average_tokens,
    draws,
    image_rows,
    sides_at,
    stages_at,
)
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.policy_keys import parse_policy

layers = st.integers(1, 60)
totals = st.integers(4, 700)
shares = st.fractions(Fraction(1, 50), Fraction(49, 50), max_denominator=50)


@given(st.sampled_from(sorted(METHODS)), shares, layers, totals, st.booleans())
def test_no_method_spends_more_and_each_all_it_can(
    method: str, share: Fraction, num_layers: int, total: int, counted: bool
) -> None:
    if counted:  # as in `budget=192`, a whole number of tokens
        share = Fraction(max(1, int(share * total)), total)
    try:
        stages = stages_at(method, share, num_layers, total if counted else None)
    except BudgetError:
        return
    policy = FlowPolicy((stages,))
    spent, budget = image_rows(policy, num_layers, total), share * total * num_layers
    assert spent <= budget
    # One token more of what is chosen, and it would cost more; of a cliff, less than a row is left.
    kept_layers = sum(policy.kept(at, 0, total) < total for at in range(num_layers))
    assert budget - spent < (1 if method == "cliff" else max(1, kept_layers))
    assert average_tokens(policy, num_layers, total) == Fraction(spent, num_layers)


@given(st.sampled_from(sorted(METHODS)), shares, layers)
def test_a_budget_is_a_policy_that_a_client_can_send(
    method: str, share: Fraction, num_layers: int
) -> None:
    try:
        stages = stages_at(method, share, num_layers)
    except BudgetError:
        assume(False)
    text = ", ".join(map(str, stages))
    read = parse_policy({"flow_stages": text}, num_layers)
    assert read is not None and read.images == (stages,)


@pytest.mark.parametrize("method", ["uniform", "diversity", "horizon", "last_prompt"])
def test_a_budget_that_leaves_no_token_is_refused(method: str) -> None:
    """A fiftieth of four tokens in each of 32 layers."""
    with pytest.raises(BudgetError, match="no token left to keep|alone cost as much"):
        stages_at(method, Fraction(1, 50), 32, 4)


def test_seeds_matter_to_what_draws() -> None:
    assert draws("random")
    assert not any(
        map(draws, ("cliff", "uniform", "diversity", "downsample", "horizon", "no such"))
    )


def test_the_demos_budgets_cost_the_same() -> None:
    """144 tokens, 30 layers: nothing is lost to rounding, so that curves meet at one place."""
    for share, tokens in ((Fraction(1, 2), 72), (Fraction(1, 3), 48), (Fraction(1, 9), 16)):
        for method in ("cliff", "uniform", "random", "diversity"):
            policy = FlowPolicy((stages_at(method, share, 30),))
            assert average_tokens(policy, 30, 144) == tokens


def test_a_cliff_between_two_layers() -> None:
    assert stages_at("cliff", Fraction(192, 576), 32, 576) == (
        Stage(10, 384, "uniform"),
        Stage(11),
    )
    assert stages_at("cliff", Fraction(1, 2), 32, 576) == (Stage(16),)


def test_what_leaves_before_decoding_costs_a_whole_prefill() -> None:
    policy = FlowPolicy(((Stage(4),),), when="decode")
    assert average_tokens(policy, 32, 576) == 576


@pytest.mark.parametrize(
    ("share", "sides"),
    [(Fraction(1, 9), (4,)), (Fraction(1, 3), (6, 7)), (Fraction(1, 200), (1,))],
)
def test_squares_on_both_sides_of_a_budget(share: Fraction, sides: tuple[int, ...]) -> None:
    assert sides_at(share, 12) == sides


@given(shares, st.integers(1, 40))
def test_squares_meet_or_bracket_a_budget(share: Fraction, full: int) -> None:
    budget, sides = share * full * full, sides_at(share, full)
    assert sides and all(1 <= side <= full for side in sides)
    assert max(sides) ** 2 >= budget
    if len(sides) == 2:
        assert sides[0] ** 2 < budget < sides[1] ** 2 and sides[1] == sides[0] + 1


@pytest.mark.parametrize(
    ("method", "says"),
    [("last_prompt", "2 layers with the whole image"), ("horizon", "all tokens up to layer 20")],
)
def test_a_budget_that_cannot_be_met_says_why(method: str, says: str) -> None:
    share = Fraction(1, 16) if method == "last_prompt" else Fraction(9, 10)
    with pytest.raises(BudgetError, match=says):
        stages_at(method, share, 32)
