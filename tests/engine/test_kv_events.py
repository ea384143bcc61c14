"""KV events: a consumer that replays the stream holds what the pool can serve, step by step.

A consumer's state is a set of (hash, group); a second one counts. Both must agree with the pool after every
step, and neither may be told to remove what it does not have, or to store what it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from tests.engine import traffic
from tests.engine.cases import LONG, Ask, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, STOCK, Engine, assert_exact
from tests.engine.tiny_llava import words
from tests.longer import some

EVENTS = {
    "enable_prefix_caching": True,
    # The null publisher: events are made and taken, and go nowhere.
    "kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
}

Entry = tuple[Any, int]
"""What a consumer keeps: the hash of a block of tokens, and the storage group."""


class Consumer:
    """Replays an engine's events, and knows every request that the engine ever had."""

    def __init__(self, engine: Engine) -> None:
        self.scheduler = engine.scheduler
        self.entries: set[Entry] = set()
        self.counts: Counter[Entry] = Counter()
        self.tokens: dict[Any, tuple[Any, tuple[int, ...]]] = {}
        self.seen: dict[str, tuple[Any, Any]] = {}

    def take(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.entries.clear()
                self.counts.clear()
                continue
            entries = [(block, event.group_idx) for block in event.block_hashes]
            if isinstance(event, BlockStored):
                assert not self.entries & set(entries), "stored twice"
                self._remember(event)
                self.entries |= set(entries)
                self.counts.update(entries)
            else:
                assert isinstance(event, BlockRemoved)
                assert set(entries) <= self.entries, "removed without having been stored"
                self.entries -= set(entries)
                self.counts.subtract(entries)

    def _remember(self, event: BlockStored) -> None:
        """A hash means one content, whichever group and event names it."""
        assert len(event.token_ids) == BLOCK_SIZE * len(event.block_hashes)
        assert event.extra_keys is None or len(event.extra_keys) == len(event.block_hashes)
        assert event.kv_cache_spec_kind == "full_attention"
        parent = event.parent_block_hash
        for index, block in enumerate(event.block_hashes):
            tokens = tuple(event.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            assert self.tokens.setdefault(block, (parent, tokens)) == (parent, tokens)
            parent = block

    def hit(self, request: Any) -> int:
        """Tokens of a request that a router would promise: whole blocks that every group has."""
        groups = range(len(self.scheduler.flow_groups.managers))
        for index, block in enumerate(map(maybe_convert_block_hash, request.block_hashes)):
            if any((block, group) not in self.entries for group in groups):
                return index * BLOCK_SIZE
        return len(request.block_hashes) * BLOCK_SIZE

    def check(self) -> None:
        """The state is the pool's: asked key by key, for all that was ever cached."""
        self.seen |= {
            name: (request, self.scheduler.flow_requests.layouts.get(name))
            for name, request in self.scheduler.requests.items()
        }
        expected = {
            (maybe_convert_block_hash(block), group)
            for request, layout in self.seen.values()
            for index, block in enumerate(request.block_hashes)
            for group, manager in enumerate(self.scheduler.flow_groups.managers)
            if servable(manager, layout, block, index + 1)
        }
        assert self.entries == expected
        assert set(+self.counts) == expected and max(self.counts.values(), default=0) <= 1


def servable(manager: Any, layout: Any, block: Any, num_blocks: int) -> bool:
    """Whether a group has all that a prefix needs for its last block of tokens."""
    from vllm_flow.boundaries import packed_boundary
    from vllm_flow.engine.core.cache_keys import POSITION, completed, tail

    kinds, ends = [], []
    if layout is None or not layout.evicts_at(manager.spec.first_layer):
        kinds.append(POSITION)
    for stage in () if layout is None else manager.findable.stages(layout):
        boundary = packed_boundary(stage.evicted, num_blocks, BLOCK_SIZE)
        kinds += [completed(stage)] if boundary.completed is not None else []
        kinds += [tail(stage)] if boundary.tail is not None else []
        ends.append(completed(stage))
    # A prefix that ends in the picture, after a full packed block, stands as long as that one does.
    return all(manager.findable.find_cached(block, kind) is not None for kind in kinds or ends)


@contextmanager
def consumed(engine: Engine) -> Iterator[Consumer]:
    """A consumer that takes the engine's events after every step and compares itself with the pool."""
    consumer, manager = Consumer(engine), engine.scheduler.kv_cache_manager
    take_events = manager.take_events

    def take() -> list[Any]:
        events = take_events()
        consumer.take(events)
        consumer.check()
        return list(events)

    manager.take_events = take
    assert engine.reset_prefix_cache()
    try:
        yield consumer
        take()
    finally:
        del manager.take_events


CHUNK = 97
"""Tokens of a chunk into which no picture goes whole, so that nobody asks for a rank that looks at one."""


@pytest.mark.parametrize("group_layers", some([2, 6], [2]))
@pytest.mark.parametrize("chunk", [CHUNK, 0])
def test_a_consumer_holds_what_the_pool_can_serve(
    open_engine: OpenEngine, group_layers: int, chunk: int
) -> None:
    """Cliffs and stages, evictions, copies, aborts, preemptions and resets."""
    assert LONG.image_tokens > CHUNK
    engine = open_engine(
        LONG,
        group_layers,
        kv_cache_memory_bytes=1700 << 10,
        max_num_seqs=6,
        max_num_batched_tokens=512,
        long_prefill_token_threshold=chunk,
        **EVENTS,
    )
    with consumed(engine) as consumer:
        went = traffic.run(engine, seed=4, requests=25, resets=0.01, stages=0.4)
    assert went.preempted and went.resets and consumer.tokens


@pytest.mark.parametrize("before", [40, 31])
@pytest.mark.parametrize("cliff", [None, 0, 3, 4])
def test_a_router_promises_what_the_engine_finds(
    open_engine: OpenEngine, cliff: int | None, before: int
) -> None:
    """From the stream alone a router knows the hit of a policy's next request, and of no other's.

    With 31 words and the first token before it, the picture begins a block.
    """
    engine = open_engine(LONG, 2, **EVENTS)
    ask = one_image(770 + before, cliff, before=before, after=90)
    with consumed(engine) as consumer:
        engine.run([ask])
        for name, other in {
            "same": Ask(f"{ask.prompt} {words(9, 1)}", ask.images, cliff),
            "other policy": Ask(ask.prompt, ask.images, 1),
        }.items():
            engine.add(name, other)
            [request] = engine.scheduler.requests.values()
            promised = consumer.hit(request)
            outputs = engine.drain()
            assert outputs[name].num_cached_tokens == promised
            assert (promised > LONG.image_tokens + before) == (name == "same")


@pytest.mark.parametrize("stages", ["2:50% last_image, 4:0", "1:40% diversity, 3:20% uniform"])
def test_what_the_device_chooses_is_promised_to_its_end_and_taken_back(
    open_engine: OpenEngine, stages: str
) -> None:
    """No prefix ends inside such a picture; a block that one would fill in part stands as long as the whole does."""
    engine = open_engine(LONG, 2, kv_cache_memory_bytes=2 << 20, **EVENTS)
    ask = replace(one_image(795, before=37, after=90), stages=stages)
    with consumed(engine) as consumer:
        engine.run([ask])
        engine.add("again", replace(ask, prompt=f"{ask.prompt} {words(9, 1)}"))
        [request] = engine.scheduler.requests.values()
        promised = consumer.hit(request)
        assert engine.drain()["again"].num_cached_tokens == promised > LONG.image_tokens + 37
        engine.run([one_image(796 + index, before=40, after=90) for index in range(6)])
        assert not consumer.hit(request), "nothing of it is left in the pool"


def test_without_a_policy_the_stream_is_stock_vllms(open_engine: OpenEngine) -> None:
    """Group by group the same blocks in the same order."""
    streams = []
    # Too short an answer to fill a block, which asked again would fill a second one of the same content.
    asks = [
        replace(one_image(780 + index, before=40, after=60), max_tokens=4) for index in range(3)
    ]
    for group_layers in (STOCK, 2):
        engine = open_engine(LONG, group_layers, **EVENTS)
        engine.reset_prefix_cache()
        engine.scheduler.kv_cache_manager.take_events()
        published: list[Any] = []
        with mock.patch.object(engine.scheduler.kv_event_publisher, "publish", published.append):
            for ask in [*asks, asks[0]]:
                engine.run([ask])
        taken = [event for batch in published for event in batch.events]
        streams.append([event for event in taken if event.group_idx == 0])
    assert streams[0] and streams[0] == streams[1]


def test_answers_are_exact_with_events(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2, **EVENTS)
    asks = [one_image(790, cliff, before=40, after=40) for cliff in (None, 0, 3)]
    assert_exact(engine, asks, engine.run(asks))
