"""More of drafts under Model Runner V2: what leaves late, random traffic, prefixes, and stock vLLM's beside ours."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.cases import LONG
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, Engine, Engines, assert_exact, assert_same
from tests.engine.test_drafters import (
    OWN,
    SYNC,
    assert_drafts_of_the_head,
    engine,
    name_of,
    test_a_drafter_stores_every_token_before_the_first_layer,
    test_answers_are_exact_whatever_was_drafted,
    test_any_groups_are_exact,
    test_random_traffic_is_exact,
    test_what_leaves_late_or_by_attention_is_exact,
    test_what_was_drafted_is_found_by_the_next_turn,
)
from tests.engine.test_speculative import ASKS, counted
from tests.engine.tiny_drafters import METHODS, speculation
from tests.engine_v2.recorded_graphs import recorded_graphs
from tests.engine_v2.test_drafters import GRAPHS

__all__ = [
    "engine",
    "test_a_drafter_stores_every_token_before_the_first_layer",
    "test_answers_are_exact_whatever_was_drafted",
    "test_any_groups_are_exact",
    "test_random_traffic_is_exact",
    "test_what_leaves_late_or_by_attention_is_exact",
    "test_what_was_drafted_is_found_by_the_next_turn",
]

pytestmark = pytest.mark.long


@pytest.mark.parametrize("engine", [SYNC], indirect=True, ids=name_of)
def test_drafts_of_captured_steps_are_those_of_the_head(
    engine: Engine, engine_store: Engines
) -> None:
    with recorded_graphs(engine, GRAPHS) as graphs:
        assert_drafts_of_the_head(engine, engine_store)
    assert graphs.drafts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_as_many_drafts_as_the_batch_is_small(
    engine_store: Engines, open_engine: OpenEngine, asynchronous: bool
) -> None:
    """vLLM's schedule by batch size: captured steps have two, three or four rows of each request."""
    drafter = speculation("eagle", LONG, engine_store.root)
    by_size = [(1, 2, 3), (3, 4, 2), (5, 12, 1)]
    own = {"speculative_config": drafter | {"num_speculative_tokens_per_batch_size": by_size}}
    engine = open_engine(LONG, 4, **OWN | own, async_scheduling=asynchronous)
    with counted(engine) as drafted, recorded_graphs(engine, [4, 8, 16, 48]) as graphs:
        outputs = engine.run(ASKS)
    assert_exact(engine, ASKS, outputs)
    assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 20, drafted
    assert {2, 3, 4} <= set(graphs.widths), graphs.widths


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_without_policy_all_is_as_in_stock_vllm(
    engine_store: Engines, open_engine: OpenEngine, method: str, asynchronous: bool
) -> None:
    """Answers, and how many of as many drafts were taken."""
    own: dict[str, Any] = {
        "speculative_config": speculation(method, LONG, engine_store.root),
        "async_scheduling": asynchronous,
        "kv_cache_memory_bytes": 4 * OWN["kv_cache_memory_bytes"],  # nobody is preempted
    }
    found = []
    for group_layers in (4, STOCK):
        engine = open_engine(LONG, group_layers, **OWN | own)
        with counted(engine) as drafted:
            found.append((engine.run([ask.without_policy() for ask in ASKS]), drafted))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and found[0][1].accepted > 10
