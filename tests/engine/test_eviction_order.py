"""A pool under pressure takes a chain's tail from all storage groups at once, as stock vLLM takes it from one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.cases import LONG, Ask, one_image, text_only
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, STOCK, Engine, assert_exact
from tests.engine.tiny_llava import words
from tests.longer import some
from vllm_flow.engine.core.freeing import by_position
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

POOL = 18
"""Blocks of tokens that the pool holds for every layer: the victim's 12, and a few others'."""
VICTIM = Ask(f"{words(60, 740)} <image> {words(150, 741)}", (742,), None, 1)
"""356 tokens: eleven whole blocks and a part."""


def small_pool(open_engine: OpenEngine, group_layers: int | None) -> Engine:
    """Pools of equal size for every number of groups; vLLM keeps one block to itself."""
    groups = 1 if group_layers is STOCK else LONG.layers // group_layers
    return open_engine(
        LONG,
        group_layers,
        enable_prefix_caching=True,
        num_gpu_blocks_override=groups * POOL + 1,
        async_scheduling=False,
    )


def others(count: int) -> list[Ask]:
    """Requests that share nothing, of 100 tokens each."""
    return [Ask(text_only(750 + index, count=99).prompt, (), None, 1) for index in range(count)]


def hit_after(engine: Engine, victim: Ask, count: int) -> int:
    """Tokens of a request that are still found once others, one by one, have been served."""
    assert engine.reset_prefix_cache()
    engine.run([victim])
    for ask in others(count):
        engine.run([ask])
    (output,) = engine.run([victim])
    assert_exact(engine, [victim], [output])
    return output.num_cached_tokens


def test_a_state_goes_with_the_tokens_whose_prefix_it_ends() -> None:
    """Two storage groups and one of states, blocks of four; what a picture leaves is stored in the second."""
    policy = FlowPolicy.withdrawal(2)
    layout = TokenLayout.of(policy, ImageSpans(((1, 9),)), 20)
    keys, states = [["k0", "k1", "k2", "k3"], ["p0", "p1"]], [["s0", "s1", "s2", "s3"]]
    whole = by_position([keys[0]] * 2, None, (0, 2), 4, states)
    assert whole == [f"{kind}{n}" for n in range(4) for kind in "kks"]
    # Of what is packed the second block begins with token 12.
    assert by_position(keys, layout, (0, 2), 4, states) == [
        *("k0", "p0", "s0", "k1", "s1", "k2", "s2", "k3", "p1", "s3")
    ]


@pytest.mark.parametrize("group_layers", some([6, 3, 2, 1], [6, 2]))
def test_hits_without_a_policy_are_stock_vllms(open_engine: OpenEngine, group_layers: int) -> None:
    """As after an unconstrained pool, so after one to six requests that push the chain out."""
    stock, engine = small_pool(open_engine, STOCK), small_pool(open_engine, group_layers)
    expected = [hit_after(stock, VICTIM, count) for count in range(7)]
    assert expected[0] == 352 and 0 < expected[4] < expected[3] < 352, "the pool does not press"
    assert [hit_after(engine, VICTIM, count) for count in range(7)] == expected


def held_blocks(engine: Engine, ask: Ask) -> list[list[Any]]:
    """The blocks that a request held in each storage group, once it is answered."""
    engine.add("held", ask)
    engine.step()
    scheduler = engine.scheduler
    [request_id] = scheduler.requests
    held = [list(manager.req_to_blocks[request_id]) for manager in scheduler.flow_groups.managers]
    engine.drain()
    return held


def first_tokens(cliff: int, group_layers: int, num_blocks: list[int]) -> list[list[int]]:
    """Per group and block, the first token of the victim that is stored there.

    Its picture takes positions 61 to 204, so of packed blocks the third is the first that lies past it.
    """
    return [
        [
            index * BLOCK_SIZE
            + (LONG.image_tokens if group * group_layers >= cliff and index > 1 else 0)
            for index in range(count)
        ]
        for group, count in enumerate(num_blocks)
    ]


@pytest.mark.parametrize("group_layers", some([6, 2, 1], [2]))
def test_a_policys_chain_loses_the_same_tail_in_every_group(
    open_engine: OpenEngine, group_layers: int
) -> None:
    """What is left of a chain is a prefix, and the next request finds all of that prefix."""
    engine = small_pool(open_engine, group_layers)
    shortened = 0
    for cliff, count in itertools.product([0, 1, 3, 4], (3, 4, 6, 8)):
        victim = replace(VICTIM, cliff=cliff, max_tokens=2)
        assert engine.reset_prefix_cache()
        groups = held_blocks(engine, victim)
        places = first_tokens(cliff, group_layers, [len(group) for group in groups])
        chain = [
            (place, block, block.block_hash)
            for group, in_group in zip(groups, places, strict=True)
            for block, place in zip(group, in_group, strict=True)
        ]
        for ask in others(count):
            engine.run([ask])
        kept = [place for place, block, key in chain if key and block.block_hash == key]
        # The last block of a group that stores by position was never full, and so never kept.
        lost = [place for place, block, key in chain if not key or block.block_hash != key]
        first_lost = min(lost, default=356)
        assert max(kept, default=0) <= first_lost, (cliff, count)
        (output,) = engine.run([victim])
        assert_exact(engine, [victim], [output])
        whole = min(352, first_lost) // BLOCK_SIZE * BLOCK_SIZE
        assert output.num_cached_tokens == whole, (cliff, count)
        shortened += 0 < whole < 352
    assert shortened > 2, "the pool does not press"


@pytest.mark.parametrize("cliff", some([0, 2, 3], [3]))
def test_a_half_filled_block_outlives_the_request_that_filled_it(
    open_engine: OpenEngine, cliff: int
) -> None:
    """One picture, many questions: each copies the block that the picture's prefix ends in.

    The copied block goes back at once, ahead of the rest of its chain. Once it is evicted, the copy serves.
    """
    engine = small_pool(open_engine, 2)
    assert engine.reset_prefix_cache()
    start = " ".join(VICTIM.prompt.split()[:100])  # 38 words past the picture
    questions = [Ask(f"{start} {words(60, 770 + n)}", (742,), cliff, 40) for n in range(3)]
    engine.run([questions[0]])
    engine.add("follower", questions[1])
    engine.step()
    scheduler = engine.scheduler
    for ask in others(8):  # while the follower is served
        engine.add("other", ask)
        while len(scheduler.requests) == 2:
            engine.step()
    assert "follower" in " ".join(scheduler.requests), "the follower was done too early"
    engine.drain()
    (output,) = engine.run([questions[2]])
    assert_exact(engine, [questions[2]], [output])
    shared = 1 + len(start.split()) - 1 + LONG.image_tokens
    assert output.num_cached_tokens == shared // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("cliff", [None, 0, 3])
def test_a_preempted_request_finds_all_that_it_had_computed(
    open_engine: OpenEngine, cliff: int | None
) -> None:
    engine = open_engine(LONG, 2, enable_prefix_caching=True, async_scheduling=False)
    ask = one_image(760, cliff, before=60, after=50)
    engine.add("victim", ask)
    engine.step()
    scheduler = engine.scheduler
    [request] = scheduler.requests.values()
    computed = request.num_computed_tokens
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    scheduler.prev_step_scheduled_req_ids.clear()  # as when a reset preempts between steps
    _, hit, _ = scheduler.kv_cache_manager.get_computed_blocks(request)
    assert hit == computed // BLOCK_SIZE * BLOCK_SIZE > LONG.image_tokens
    outputs = engine.drain()
    assert_exact(engine, [ask], [outputs["victim"]])
