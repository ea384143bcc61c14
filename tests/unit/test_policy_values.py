"""One value at a time: what is read of each key, at its very bounds, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.policy import WHOLE, Stage
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_values import (
    MAX_SEED,
    read_choice,
    read_keep,
    read_layer,
    read_rank,
    read_seed,
    read_stages,
)
from vllm_flow.ranks import RANKS, merges

LAYERS = 32
NO_INTEGERS = (True, False, 1.0, "1", None, [1], {"layer": 1})


@given(st.integers(-3, LAYERS + 3), st.integers(1, LAYERS))
def test_a_layer_is_one_of_the_model_or_the_one_behind(layer: int, num_layers: int) -> None:
    if 0 <= layer <= num_layers:
        assert read_layer("flow_cliff", layer, num_layers) == layer
    else:
        with pytest.raises(PolicyError, match=f"there is no such layer; .* to {num_layers} "):
            read_layer("flow_cliff", layer, num_layers)


@pytest.mark.parametrize("value", NO_INTEGERS)
def test_what_is_no_integer_is_neither_layer_nor_seed(value: Any) -> None:
    with pytest.raises(PolicyError, match="is not a layer"):
        read_layer("flow_cliff", value, LAYERS)
    with pytest.raises(PolicyError, match=f"an integer from 0 to {MAX_SEED}"):
        read_seed("flow_seed", value)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_seeds_are_numpys(seed: int) -> None:
    assert read_seed("flow_seed", seed) == seed


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_other_seeds_are_refused(seed: int) -> None:
    with pytest.raises(PolicyError, match="an integer from 0 to"):
        read_seed("flow_seed", seed)


@given(st.integers(0, 2**31 - 1))
def test_a_number_of_tokens_may_be_written_as_text(keep: int) -> None:
    assert read_keep("flow_keep", keep) == read_keep("flow_keep", f" {keep} ") == keep


@given(
    st.integers(0, 400),
    st.integers(1, 400),
    st.integers(0, 99),
    st.sampled_from(["", ".5", ".125"]),
)
def test_a_share_is_exact(part: int, of: int, percent: int, rest: str) -> None:
    def read(share: Fraction) -> Any:
        return WHOLE if share == 1 else 0 if share == 0 else share

    exact = Fraction(f"{percent}{rest or '.0'}") / 100
    assert read_keep("flow_keep", f"{percent}{rest}%") == read(exact)
    assert read_keep("flow_keep", "100%") == WHOLE
    if part <= of:
        assert read_keep("flow_keep", f"{part}/{of}") == read(Fraction(part, of))
    else:
        with pytest.raises(PolicyError, match="the share is too large"):
            read_keep("flow_keep", f"{part}/{of}")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((value, "it must be a number of tokens") for value in NO_INTEGERS if value != "1"),
        (-1, "it must be a number of tokens"),
        ("100.5%", "the share is too large"),
        ("٢٥%", "it must be a number of tokens"),
        ("٣/٤", "it must be a number of tokens"),
        ("50 %", "it must be a number of tokens"),
        ("1/0", "it must be a number of tokens"),
        ("0." + "1" * 22 + "%", "it must be a number of tokens"),
        ("101%", "the share is too large: no more than 100%"),
        ("71/70", "the share is too large"),
        (0.25, 'written as text, so that it is exact: "25%"'),
        (2**31, "no image has so many tokens"),
        (str(2**31), "no image has so many tokens"),
    ],
)
def test_what_nobody_can_keep_is_refused(value: Any, said: str) -> None:
    with pytest.raises(PolicyError) as error:
        read_keep("flow_keep", value)
    assert said in str(error.value)


def test_a_long_share_is_read_as_long_as_it_is_24_characters() -> None:
    share = "0." + "1" * 21 + "%"
    assert len(share) == 24 and read_keep("flow_keep", share) == Fraction(share[:-1]) / 100


@pytest.mark.parametrize("name", sorted(RANKS))
def test_ranks_by_a_layer_have_one_before_them(name: str) -> None:
    if merges(RANKS[name]):
        with pytest.raises(
            PolicyError, match="merges what enters the decoder, .* start at layer 0"
        ):
            read_rank("flow_rank", name, 1)
    else:
        assert read_rank("flow_rank", name, 1) == name
    if RANKS[name].reads_layer:
        with pytest.raises(PolicyError, match="no layer is before layer 0"):
            read_rank("flow_rank", name, 0)
    else:
        assert read_rank("flow_rank", name, 0) == name


def test_names_are_hinted_at_or_listed() -> None:
    assert read_choice("flow_when", "decode", ("prefill", "decode")) == "decode"
    with pytest.raises(PolicyError, match="did you mean 'decode'"):
        read_choice("flow_when", "decod", ("prefill", "decode"))
    for value in ("never", 3, None):
        with pytest.raises(PolicyError, match="known: 'prefill', 'decode'"):
            read_choice("flow_when", value, ("prefill", "decode"))


def test_stages_at_the_models_end_are_none() -> None:
    found = read_stages("flow_stages", "0:50% uniform,31:3 random, 32:0 ", LAYERS)
    assert found == (Stage(0, Fraction(1, 2), "uniform"), Stage(31, 3, "random"))
    assert read_stages("flow_stages", "32:0", LAYERS) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("٣:0", "is no stage"),
        ("3:٠", "is no stage"),
        ("3:0, 3:0", "layer 3 comes after layer 3"),
        ("3:0 uniform", "keeps nothing that could be ranked"),
        ("3:0% uniform", "keeps nothing that could be ranked"),
        ("3:2", "does not say which"),
        ("3:2 uniform, 4:3 uniform", "keeps more than '3:2 uniform' left"),
        ("3:20% uniform, 4:21% uniform", "keeps more than"),
        ("3:0, 4:0", "'3:0' leaves nothing for '4:0'; leave '4:0' out"),
    ],
)
def test_stages_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(PolicyError) as error:
        read_stages("flow_stages", text, LAYERS)
    assert said in str(error.value)


def test_stages_may_keep_as_much_as_before_and_a_number_after_a_share() -> None:
    for text in (
        "3:2 uniform, 4:2 random",
        "3:2% uniform, 4:9 uniform",
        "3:9 uniform, 4:50% uniform",
    ):
        assert len(read_stages("flow_stages", text, LAYERS)) == 2


def test_no_policy_is_longer_than_two_thousand_characters() -> None:
    longest = "3:0".ljust(2000)
    assert read_stages("flow_stages", longest, LAYERS) == (Stage(3, 0, None),)
    with pytest.raises(PolicyError, match="write stages as"):
        read_stages("flow_stages", longest + " ", LAYERS)
