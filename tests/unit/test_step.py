"""A request's share of a step, and what a plan's variants say of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans
from vllm_flow.step import ScheduledRequest, StepPlan, Variant, scheduled_request

PROMPT = 12
IMAGE = ImageSpans(((2, 8),))
AT_ONCE = TokenLayout.of(FlowPolicy.withdrawal(1), IMAGE, PROMPT)
LATE = TokenLayout.of(replace(FlowPolicy.withdrawal(1), when="decode"), IMAGE, PROMPT)
RANGES = ((2, 5), (5, 8))
tokens = st.integers(0, 20), st.integers(1, 20)


@given(*tokens)
def test_what_leaves_in_the_prefill_has_effect_in_every_step(computed: int, scheduled: int) -> None:
    found = scheduled_request(computed, scheduled, AT_ONCE)
    assert found == ScheduledRequest(computed, scheduled, AT_ONCE)
    assert scheduled_request(computed, scheduled, None) == ScheduledRequest(computed, scheduled)


@given(*tokens)
def test_what_leaves_late_has_effect_once_the_prompt_is_computed(
    computed: int, scheduled: int
) -> None:
    end = computed + scheduled
    assert LATE is not None and LATE.late
    if end <= PROMPT:
        assert scheduled_request(computed, scheduled, LATE).layout is None
    elif computed >= PROMPT:
        assert scheduled_request(computed, scheduled, LATE).layout is LATE
    else:
        with pytest.raises(ValueError, match=f"tokens {computed} to {end} .* token {PROMPT}"):
            scheduled_request(computed, scheduled, LATE)


@given(*tokens)
def test_mutual_ranges_are_those_of_the_steps_own_tokens(computed: int, scheduled: int) -> None:
    own = set(range(computed, computed + scheduled))
    found = scheduled_request(computed, scheduled, None, RANGES)
    assert found.mutual == tuple(each for each in RANGES if own & set(range(*each)))


def variant(first_layer: int, lengths: list[int], before: list[int], whole: bool) -> Variant:
    """Requests with so many rows of their own, after so many stored tokens."""
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    requests = np.arange(len(lengths))
    return Variant(
        first_layer=first_layer,
        rows=None if whole else np.arange(starts[-1]),
        gather=None,
        row_requests=np.repeat(requests, lengths),
        positions=np.zeros(starts[-1], dtype=np.int64),
        requests=requests,
        query_start_loc=starts,
        seq_lens=np.array(lengths, dtype=np.int64) + np.array(before, dtype=np.int64),
    )


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=5),
    st.booleans(),
)
def test_a_variant_knows_its_lengths(requests: list[tuple[int, int]], whole: bool) -> None:
    lengths, before = [own for own, _ in requests], [stored for _, stored in requests]
    found = variant(0, lengths, before, whole)
    assert found.num_rows == sum(lengths)
    assert found.max_query_len == max(lengths, default=0)
    assert found.max_seq_len == max(map(sum, requests), default=0)
    assert found.continues_states == (whole and all(before))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(sorted))
def test_a_layers_variant_is_the_last_that_has_begun(firsts: list[int]) -> None:
    variants = tuple(variant(first, [1], [0], True) for first in firsts)
    plan = StepPlan(1, variants, np.ones(1, dtype=np.int64))
    for layer in range(11):
        begun = [each for each in variants if each.first_layer <= layer]
        assert plan.variant_at(layer) is (begun[-1] if begun else None)
