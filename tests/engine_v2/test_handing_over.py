"""Prefill in one engine, decode in another, again under Model Runner V2."""

from __future__ import annotations

import pytest

from tests.engine.test_handing_over import (
    open_node,
    test_a_prompt_of_another_policy_is_refused,
    test_the_other_engine_goes_on_exactly,
    test_what_came_over_is_found_by_the_next_turn,
    test_what_is_sent_is_the_arithmetic_of_scale,
)

__all__ = [
    "open_node",
    "test_a_prompt_of_another_policy_is_refused",
    "test_the_other_engine_goes_on_exactly",
    "test_what_came_over_is_found_by_the_next_turn",
    "test_what_is_sent_is_the_arithmetic_of_scale",
]

pytestmark = pytest.mark.long
