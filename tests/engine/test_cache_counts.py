"""What a request with a policy reports of the prefix cache, beside stock vLLM's figures."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from vllm.config import KVEventsConfig
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from tests.engine.bare_prompts import prompt
from tests.engine.bare_scheduler import LAYERS, BareScheduler, OpenBare
from tests.engine.harness import BLOCK_SIZE, STOCK

ROOM = 200
"""Blocks: nothing is evicted from the cache."""
TRAFFIC = (
    ("cold", prompt(40, 144, 60)),
    ("again", prompt(40, 144, 60)),
    ("longer", prompt(40, 144, 60) + [9] * 75),
    ("image first", prompt(0, 144, 79)),
    ("image first, longer", prompt(0, 144, 79) + [9] * 33),
    ("whole blocks", prompt(16, 144, 32)),
    ("short", prompt(3, 20, 5)),
)


def counts(engine: BareScheduler, cliff: int | None, **policy: Any) -> dict[str, tuple[int, int]]:
    """Tokens found in the cache, and tokens added to it, per request; one after the other."""
    for name, tokens in TRAFFIC:
        engine.add(name, tokens, cliff, **policy)
        engine.drain()
    return {
        name: (stats.num_cached_tokens, stats.num_cache_creation_tokens)
        for name, stats in engine.stats.items()
    }


@pytest.mark.parametrize(
    "options", [{}, {"long_prefill_token_threshold": 50}, {"asynchronous": True}]
)
@pytest.mark.parametrize("group_layers", [1, 2, 3, 6])
def test_requests_report_what_stock_vllm_reports(
    bare: OpenBare, group_layers: int, options: dict[str, Any]
) -> None:
    stock = bare(STOCK, ROOM, **options)
    expected = counts(stock, None)
    assert expected["again"][0] and expected["cold"][1] and stock.looked_up["hits"]
    for cliff in (None, *range(LAYERS + 1)):
        engine = bare(group_layers, ROOM, **options)
        assert counts(engine, cliff) == expected, cliff
        assert engine.looked_up == stock.looked_up, cliff


@pytest.mark.parametrize("kept", [20, 70, 100])
@pytest.mark.parametrize("group_layers", [1, 2, 6])
def test_what_a_device_chooses_is_found_as_a_whole(
    bare: OpenBare, group_layers: int, kept: int
) -> None:
    """Also where what stays of the image fills blocks in the middle of it, at which no prefix ends."""
    expected = counts(bare(STOCK, ROOM), None)
    found = counts(bare(group_layers, ROOM), None, flow_stages=f"2:{kept} diversity, 4:0")
    for name in ("again", "longer", "image first, longer"):
        assert found[name] == expected[name], name


@pytest.mark.parametrize("before", [0, BLOCK_SIZE, BLOCK_SIZE + 5])
@pytest.mark.parametrize("cliff", range(LAYERS + 1))
def test_what_needs_no_slot_is_no_find(bare: OpenBare, cliff: int, before: int) -> None:
    """Whole blocks of an image need none at cliff 0; they are found only if somebody had them."""
    shared = before // BLOCK_SIZE * BLOCK_SIZE
    for image in (BLOCK_SIZE, 4 * BLOCK_SIZE, 144):
        engine = bare(2, ROOM)
        engine.add("other picture", prompt(before, 200, 20), cliff)
        engine.drain()
        engine.add("cold", prompt(before, image, 20), cliff)
        engine.drain()
        assert engine.stats["cold"].num_cached_tokens == engine.looked_up["hits"] == shared
        assert engine.looked_up["queries"] == 2 * (before + 20) + 200 + image
        engine.add("other question", prompt(before, image, 20, word=8), cliff)
        engine.drain()
        found = engine.stats["other question"].num_cached_tokens
        # An image that comes first leaves nothing to know it by.
        expected = 0 if cliff == before == 0 else (before + image) // BLOCK_SIZE * BLOCK_SIZE
        assert found == expected, image


def test_without_a_cache_nothing_is_reported(bare: OpenBare) -> None:
    engine = bare(2, ROOM, enable_prefix_caching=False)
    assert set(counts(engine, 3).values()) == {(0, 0)}


@pytest.mark.parametrize("mode", ["full", "incremental"])
def test_a_hit_is_told_of_where_the_request_asks_for_it(bare: OpenBare, mode: str) -> None:
    """``kv_cache_report_mode`` as stock vLLM heeds it, for each storage group."""
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    first = prompt(40, 144, 60)
    for group_layers, cliff in [(STOCK, None), *itertools.product((1, 2, 6), range(LAYERS + 1))]:
        engine = bare(group_layers, ROOM, kv_events_config=events)
        manager = engine.scheduler.kv_cache_manager
        engine.add("first", first, cliff)
        engine.drain()
        manager.take_events()
        request = engine.add("again", first, cliff, kv_cache_report_mode=mode)
        hit = manager.get_computed_blocks(request)[1]
        told = {event.group_idx: event.block_hashes for event in manager.take_events()}
        expected = [maybe_convert_block_hash(key) for key in request.block_hashes]
        assert hit == 224
        if mode == "full":
            groups = range(len(engine.managers))
            assert told == {group: expected[: hit // BLOCK_SIZE] for group in groups}, cliff
        else:
            assert not told
        engine.drain()
