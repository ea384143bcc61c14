"""Blocks that go through a pool as lists leave it as vLLM leaves it block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id

from vllm_flow.engine.core import cache_keys
from vllm_flow.engine.core.bulk_pool import BulkBlockPool, speed_up

SIZE = 4
BLOCKS = 9


def opened(**options: Any) -> BlockPool:
    return BlockPool(BLOCKS, True, SIZE, **options)


def state(pool: BlockPool) -> dict[str, Any]:
    """All that a pool knows, by block ids."""
    named = pool.cached_block_hash_to_block._cache
    return {
        "free": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
        "count": pool.get_num_free_blocks(),
        "blocks": [(b.ref_cnt, b.block_hash, b.block_hash_num_tokens) for b in pool.blocks],
        "named": {
            key: [held.block_id] if isinstance(held, KVCacheBlock) else list(held)
            for key, held in named.items()
        },
        "more": dict(pool.cached_block_hashes_by_block),
    }


def prefix(number: int, text: int) -> bytes:
    return bytes([text, number]) * 16


class BothPools:
    """A pool that was sped up, beside vLLM's; a list of block ids stands for one request in one group."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.ours, self.theirs = opened(), opened()
        speed_up(self.ours)
        self.held: list[list[int]] = []
        self.reused: tuple[list[int], list[int]] = ([], [])
        """Blocks of which each told a connector that they are taken."""
        self.kinds: Counter[str] = Counter()
        """How often a pool had an unusual case before it."""

    def both(self, ask: Callable[[BlockPool], Any]) -> Any:
        """The answer of both, or that both refuse."""
        answers: list[Any] = []
        for pool in (self.ours, self.theirs):
            try:
                answers.append(ask(pool))
            except ValueError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]
        return answers[0]

    def take(self) -> None:
        count = self.random.randint(0, 4)
        front = self.theirs.free_block_queue.get_all_free_blocks()[:count]
        self.kinds["named before"] += any(block.block_hash is not None for block in front)
        found = self.both(lambda pool: [block.block_id for block in pool.get_new_blocks(count)])
        if isinstance(found, list):
            self.held.append(found)

    def cache(self, ids: list[int]) -> None:
        """By position, of one of two texts: another block may have the name already."""
        if self.random.random() < 0.2:
            ids = [0, *ids]  # vLLM's null block
        first = next((n for n, i in enumerate(ids) if self.theirs.blocks[i].block_hash is None), 0)
        last = next(
            (n for n, i in enumerate(ids[first:], first) if self.theirs.blocks[i].block_hash),
            len(ids),
        )  # vLLM names a block only once
        text = self.random.randint(0, 1)
        request = SimpleNamespace(block_hashes=[prefix(n, text) for n in range(len(ids))])
        keys = [make_block_hash_with_group_id(p, 0) for p in request.block_hashes[first:last]]
        named = self.theirs.cached_block_hash_to_block
        self.kinds["names another"] += any(named.get_one_block(key) for key in keys)
        self.kinds["null block"] += first == 0 and ids[:1] == [0]
        self.both(
            lambda pool: pool.cache_full_blocks(
                request, [pool.blocks[i] for i in ids], first, last, SIZE, 0
            )
        )

    def name(self, ids: list[int]) -> None:
        """By several prefixes, as packed blocks are."""
        if not ids:
            return
        index, kind = self.random.choice(ids), self.random.randint(0, 2) * cache_keys.KINDS_APART
        prefixes = [prefix(n, 2) for n in self.random.sample(range(7), self.random.randint(1, 4))]
        cache_keys.insert(self.ours, self.ours.blocks[index], prefixes, kind, 1, SIZE)
        for one in prefixes:
            key = make_block_hash_with_group_id(one, kind + 1)
            self.theirs._insert_block_hash(key, self.theirs.blocks[index], SIZE)

    def touch(self, ids: list[int]) -> None:
        self.both(lambda pool: pool.touch([pool.blocks[i] for i in ids]))
        self.held.append(ids)

    def free(self, ids: list[int]) -> None:
        self.held.remove(ids)
        self.both(lambda pool: pool.free_blocks([pool.blocks[i] for i in reversed(ids)]))

    def give_up(self, ids: list[int]) -> None:
        """As a connector does whose blocks may be read until they are taken."""
        self.held.remove(ids)
        for pool, reused in ((self.ours, self.reused[0]), (self.theirs, self.reused[1])):
            pool.unpin_blocks(
                [pool.blocks[i] for i in ids],
                lambda block, reused=reused: reused.append(block.block_id),
            )

    def evict(self, ids: list[int]) -> None:
        self.both(lambda pool: pool.evict_blocks(set(ids)))

    def step(self) -> None:
        whole = [self.take, lambda: self.both(lambda pool: pool.reset_prefix_cache())]
        of_request = [self.cache, self.name, self.touch, self.free, self.give_up, self.evict]
        if not self.held or self.random.random() < 0.35:
            self.random.choices(whole, (9, 1))[0]()
        else:
            act = self.random.choices(of_request, (6, 4, 2, 8, 1, 1))[0]
            act(self.random.choice(self.held))


@pytest.mark.parametrize("seed", range(6))
def test_a_pool_is_left_as_vllm_leaves_it(seed: int) -> None:
    pools = BothPools(Random(seed))
    for _ in range(400):
        pools.step()
        assert state(pools.ours) == state(pools.theirs)
        assert pools.reused[0] == pools.reused[1]
    assert all(pools.kinds[kind] for kind in ("named before", "names another", "null block"))
    assert pools.reused[0]


@pytest.mark.parametrize("kind", range(4))
def test_a_pool_that_tells_of_blocks_stays_vllms(kind: int) -> None:
    """Its events and metrics are of single blocks."""
    pool = (
        opened(enable_kv_cache_events=True),
        opened(metrics_collector=KVCacheMetricsCollector()),
        BlockPool(BLOCKS, False, SIZE),
        opened(),
    )[kind]
    speed_up(pool)
    assert isinstance(pool, BulkBlockPool) is (kind == 3)
