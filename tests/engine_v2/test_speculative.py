"""Drafts from the text itself, again under Model Runner V2, which looks for them on the device.

By either name: vLLM schedules asynchronously beside one of them alone.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.cases import LONG
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine
from tests.engine.options import DRAFTS
from tests.engine.test_speculative import (
    OPTIONS,
    test_a_last_token_alone_is_no_step_of_a_late_eviction,
    test_answers_are_exact_whatever_was_drafted,
    test_random_traffic_is_exact,
    test_what_was_drafted_is_found_by_the_next_turn,
)

__all__ = [
    "test_a_last_token_alone_is_no_step_of_a_late_eviction",
    "test_answers_are_exact_whatever_was_drafted",
    "test_random_traffic_is_exact",
    "test_what_was_drafted_is_found_by_the_next_turn",
]

pytestmark = pytest.mark.long


@pytest.fixture(params=["ngram", "ngram_gpu"])
def engine(request: Any, open_engine: OpenEngine) -> Engine:
    own = {
        "speculative_config": DRAFTS | {"method": request.param},
        "async_scheduling": request.param == "ngram_gpu",
    }
    return open_engine(LONG, 2, **OPTIONS | own)
