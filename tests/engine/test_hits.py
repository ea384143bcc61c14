"""The longest prefix that is still there: as a plain rule finds it, and what finding it costs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool

from tests.engine.bare_prompts import prompt
from tests.engine.bare_scheduler import OpenBare
from tests.engine.harness import BLOCK_SIZE
from tests.unit.staged_cases import LAYERS, Case, cases
from vllm_flow.boundaries import packed_boundary
from vllm_flow.engine.core import cache_keys, hits, prefix
from vllm_flow.engine.core.cache_keys import POSITION, completed, tail
from vllm_flow.engine.core.findable import FindableBlocks
from vllm_flow.engine.core.hits import Hit, lacks, longest_hit
from vllm_flow.engine.core.prefix_keys import Prefixes
from vllm_flow.engine.core.state_blocks import FlowStateManager
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.spans import ImageSpans


class CountingNames(dict):  # type: ignore[type-arg]
    """What a pool finds blocks by, counting how often it is asked."""

    reads = 0

    def get(self, *args: Any) -> Any:
        self.reads += 1
        return super().get(*args)


class Cache:
    """The managers of storage groups over a pool in which prefixes of one request are cached.

    Args:
        num_tokens: of the request that was there before.
        of_states: groups of states, in which every prefix has one.
    """

    def __init__(
        self, layout: TokenLayout, num_tokens: int, size: int, group_layers: int, of_states: int = 0
    ) -> None:
        self.layout, self.size = layout, size
        self.hashes: Any = [bytes([n % 256, n // 256]) for n in range(num_tokens // size)]
        starts = range(0, LAYERS, group_layers)
        groups = len(starts) + of_states
        self.pool = BlockPool((groups * len(self.hashes) + 1) * (LAYERS + 1), True, size)
        self.names = CountingNames()
        self.pool.cached_block_hash_to_block._cache = self.names
        self.managers: list[Any] = []
        prefixes = Prefixes(self.hashes, layout, size, 0, len(self.hashes))
        for group, first in enumerate(starts):
            spec: Any = SimpleNamespace(
                first_layer=first, last_layer=min(first + group_layers, LAYERS) - 1
            )
            manager = FindableBlocks(spec, self.pool, group, size, {})
            held = self.pool.get_new_blocks(len(self.hashes)) if self.hashes else []
            request: Any = SimpleNamespace(request_id="donor", block_hashes=self.hashes)
            manager.cache_prefixes(request, prefixes, held)
            self.managers.append(manager)
        self.states: list[Any] = []
        for group in range(len(starts), groups):
            of_state: Any = FlowStateManager.__new__(FlowStateManager)
            self._managed(of_state, group)
            for num_blocks, key, may_end in prefixes.named:
                if may_end:
                    (block,) = self.pool.get_new_blocks(1)
                    end = num_blocks * size
                    cache_keys.insert(self.pool, block, [key], POSITION, group, end)
            self.states.append(of_state)

    def _managed(self, manager: Any, group: int) -> None:
        manager.block_pool, manager.kv_cache_group_id = self.pool, group
        manager.block_size = self.size

    def look_up(self, max_tokens: int) -> Hit:
        return longest_hit(self.hashes, max_tokens, self.layout, self.managers, self.states)


def plain_hit(cache: Cache, max_tokens: int) -> tuple[list[list[Any]], int, int]:
    """:func:`longest_hit` by its rule: every prefix for itself, from the shortest on.

    Blocks are those of storage groups, then those of states.
    """
    best: list[list[Any]] = [[] for _ in (*cache.managers, *cache.states)]
    tokens = without_states = 0
    layout, size = cache.layout, cache.size
    for n in range(1, min(layout.findable(max_tokens) // size, len(cache.hashes)) + 1):
        held = [plain_blocks(cache, manager, n) for manager in cache.managers]
        if any(blocks == "never" for blocks in held):
            break
        ends = layout.may_end_at(n * size)
        if not ends or not any(held) or any(blocks is None for blocks in held):
            continue
        without_states = n * size
        key = Prefixes(cache.hashes, layout, size, 0, n).key(n)
        states = [
            cache_keys.find(cache.pool, key, POSITION, m.kv_cache_group_id) for m in cache.states
        ]
        if all(states):
            padded = [[cache.pool.null_block] * (n - 1) + [state] for state in states]
            best, tokens = [*held, *padded], n * size
    return best, tokens, without_states


def plain_blocks(cache: Cache, manager: Any, num_blocks: int) -> Any:
    """A storage group's blocks of a prefix, None if it does not end here, "never" if no longer one is whole."""
    layout, size = cache.layout, cache.size
    prefixes = Prefixes(cache.hashes, layout, size, 0, num_blocks)
    positions = []
    if not layout.evicts_at(manager.spec.first_layer):
        positions = [manager.find_cached(key, POSITION) for key in cache.hashes[:num_blocks]]
    by_stage: list[list[Any]] = []
    end_known = True
    for stage in manager.stages(layout):
        full: list[Any] = []
        last: list[Any] = []
        for n in range(1, num_blocks + 1):
            boundary = packed_boundary(stage.evicted, n, size)
            if boundary.completed == len(full):
                full.append(manager.find_cached(prefixes.key(n), completed(stage)))
            elif boundary.completed is not None and n == num_blocks:
                end_known &= manager.find_cached(prefixes.key(n), completed(stage)) is not None
            if boundary.tail is not None and n == num_blocks:
                last = [manager.find_cached(prefixes.key(n), tail(stage))]
                end_known &= last != [None]
        positions = positions if None not in full else [None]
        by_stage.append(full + last)
    if None in positions:
        return "never"
    if not end_known:
        return None
    held: list[Any] = []
    for blocks in (
        *reversed(by_stage),
        positions,
    ):  # what a deeper stage has filled, all had filled
        held += blocks[len(held) :]
    return held


def ids(blocks: Sequence[Sequence[Any]]) -> list[list[int]]:
    return [[block.block_id for block in of_group] for of_group in blocks]


@st.composite
def caches(draw: st.DrawFn) -> tuple[Cache, int]:
    """A cache that has lost some names, and how long a hit may be."""
    case: Case = draw(cases().filter(lambda case: case.layout is not None))
    layout = case.layout
    assert layout is not None
    if layout.shareable is not None:
        object.__setattr__(layout, "digest", b"whole prompt")
    size = draw(st.integers(1, 4))
    cache = Cache(layout, case.length, size, draw(st.integers(1, 3)), draw(st.integers(0, 2)))
    names = list(cache.names)
    kept_whole = draw(st.sets(st.integers(0, LAYERS)))  # most holes would leave nothing to find
    for at in draw(st.sets(st.integers(0, max(len(names) - 1, 0)), max_size=6)) if names else ():
        if at % (LAYERS + 1) not in kept_whole:
            del cache.names[names[at]]
    return cache, draw(st.integers(0, case.length))


@settings(deadline=None, max_examples=150)
@given(caches())
def test_the_longest_hit_is_that_of_the_plain_rule(case: tuple[Cache, int]) -> None:
    cache, max_tokens = case
    blocks, tokens, without_states = plain_hit(cache, max_tokens)
    found = cache.look_up(max_tokens)
    assert (found.tokens, found.without_states) == (tokens, without_states)
    assert ids(found.blocks) == ids(blocks)


@settings(deadline=None, max_examples=40)
@given(caches())
def test_a_prefix_that_lacks_its_last_block_is_no_hit(case: tuple[Cache, int]) -> None:
    cache, _ = case
    hit = cache.look_up(len(cache.hashes) * cache.size).tokens // cache.size
    lacking = [
        n
        for n in range(1, len(cache.hashes) + 1)
        if lacks(cache.hashes, n, cache.layout, cache.managers)
    ]
    assert all(hit < n for n in lacking)
    assert lacking == [n for n in range(1, len(cache.hashes) + 1) if plainly_lacks(cache, n)]


def plainly_lacks(cache: Cache, num_blocks: int) -> bool:
    """:func:`lacks` by its rule: of all that the shortest prefixes fill, what the last block of tokens does."""
    layout, size = cache.layout, cache.size
    key = Prefixes(cache.hashes, layout, size, 0, num_blocks).key(num_blocks)
    for manager in cache.managers:
        names = [] if layout.evicts_at(manager.spec.first_layer) else [POSITION]
        for stage in manager.stages(layout):
            kept = np.flatnonzero(~stage.evicted.is_image(np.arange(num_blocks * size)))
            filling = kept[size - 1 :: size]  # the token that fills each packed block
            names += [completed(stage)] * bool((filling >= (num_blocks - 1) * size).any())
        hashes = {POSITION: cache.hashes[num_blocks - 1]}
        if any(manager.find_cached(hashes.get(name, key), name) is None for name in names):
            return True
    return False


def one_picture(num_blocks: int, size: int = 4) -> TokenLayout:
    """A picture that is the first half of a prompt, and leaves in three stages."""
    policy = FlowPolicy(((Stage(1, 9, "uniform"), Stage(3, 5, "uniform"), Stage(5, 0, None)),))
    spans = ImageSpans.from_ranges([(1, num_blocks * size // 2)])
    layout = TokenLayout.of(policy, spans, num_blocks * size)
    assert layout is not None
    return layout


@pytest.mark.parametrize("lost", ["nothing", "ends", "states"])
def test_a_look_up_costs_what_its_blocks_do(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Names asked for, and blocks put into lists, on prompts of one length and of eight times as much."""
    built = 0
    blocks_of = hits._GroupHit.blocks

    def counted(self: Any, *args: Any) -> Any:
        nonlocal built
        blocks = blocks_of(self, *args)
        built += len(blocks or ())
        return blocks

    monkeypatch.setattr(hits._GroupHit, "blocks", counted)
    spent = []
    for num_blocks in (32, 256):
        layout = one_picture(num_blocks)
        cache = Cache(layout, num_blocks * 4, 4, 2, 2)
        groups = {"nothing": (), "ends": (0, 1, 2), "states": (4,)}[lost]
        for key in [k for k in cache.names if key_group(k) in groups]:
            if lost == "states" or key_kind(key) in {tail(stage) for stage in layout.stages}:
                del cache.names[key]
        cache.names.reads = built = 0
        found = cache.look_up(num_blocks * 4)
        if lost != "ends":  # without states the whole prompt is there
            assert found.without_states == num_blocks * 4
        held = sum(map(len, found.blocks[:3]))
        assert built == held, "lists are built once, of what is found"
        spent.append(cache.names.reads)
    assert spent[1] <= 8 * spent[0] + 8
    # By position 1, by rank 5 in all, a tail of each at most, and 2 states: of each prefix.
    assert spent[1] <= 256 * 12


def key_group(key: bytes) -> int:
    return int.from_bytes(key[-4:], "big") % cache_keys.KINDS_APART


def key_kind(key: bytes) -> int:
    return int.from_bytes(key[-4:], "big") - key_group(key)


def test_who_waits_for_a_prefix_in_flight_looks_nothing_up(
    bare: OpenBare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being computed is not there yet, and one look at its last block says so."""
    engine = bare(2, 200, max_num_batched_tokens=2 * BLOCK_SIZE, max_num_seqs=8)
    looked_up: list[int] = []

    def counted(hashes: Any, *args: Any) -> Hit:
        looked_up.append(len(hashes))
        return longest_hit(hashes, *args)

    monkeypatch.setattr(prefix, "longest_hit", counted)
    tokens = prompt(5, BLOCK_SIZE, 7 * BLOCK_SIZE - 5)
    engine.add("leader", tokens, cliff=3)
    engine.step()
    for name in "abc":
        engine.add(name, [*tokens, 6, 6], cliff=3)
    looked_up.clear()
    assert engine.step() == ["leader"]
    assert engine.step() == ["leader"]
    assert not looked_up
    engine.drain()
    assert {engine.stats[name].num_cached_tokens for name in "abc"} == {8 * BLOCK_SIZE}
