"""No traffic ends the engine with "Encoder cache miss": what a step's pictures need is there when it runs.

The encoder cache holds one picture or two here, so that an output is gone when it is needed again.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine import traffic, v2_cpu
from tests.engine.cases import GQA, LONG, Ask, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, assert_exact
from tests.engine.tiny_llava import words
from tests.longer import some

ONE_PICTURE = {"enable_prefix_caching": True, "max_num_batched_tokens": 150, "max_num_seqs": 8}


@pytest.mark.parametrize("cliff", v2_cpu.reduced(some([None, 2, 3], [None, 3]), to=[2]))
def test_a_prefix_that_covered_the_picture_is_lost(
    open_engine: OpenEngine, cliff: int | None
) -> None:
    """The request reached the worker without its picture, and after the reset the encoder must run."""
    engine = open_engine(LONG, 2, **ONE_PICTURE)
    first, other = one_image(700, cliff, before=20, after=30), one_image(701, cliff)
    engine.run([first])
    engine.add("follower", first)
    engine.step()
    engine.add("other", other)  # whose picture takes the cache's only place
    for _ in range(3):
        engine.step()
    assert engine.reset_prefix_cache()
    outputs = engine.drain()
    assert outputs["follower"].num_cached_tokens > LONG.image_tokens, "no hit to be lost"
    assert_exact(engine, [first, other], [outputs["follower"], outputs["other"]])


def test_followers_lose_the_prefix_they_waited_for(open_engine: OpenEngine) -> None:
    """As in service: nobody resets anything, but a pool that is too small takes hits away again."""
    engine = open_engine(LONG, 2, kv_cache_memory_bytes=1700 << 10, **ONE_PICTURE)
    asks = []
    for picture in range(3):
        first = one_image(710 + picture, (0, 2, 5)[picture], before=30, after=20)
        asks += [replace(first, prompt=f"{first.prompt} {words(30, n)}") for n in range(4)]
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted, "the pool is too large for this test"
    assert_exact(engine, asks, outputs, ties=True)


def priority_asks(shared: bool) -> tuple[Ask, Ask]:
    """A request that reaches its picture just when the second, more important, takes its blocks.

    Chunks are a block long; the pool holds nine blocks per group. The first has taken six of them when its
    picture's first token comes (position 166), the second needs its fourth then.
    """
    late = Ask(f"{words(165, 730)} <image> w1 w2", (731,), 2, 4)
    if shared:  # whose own chunk holds the same picture
        return late, Ask(f"{words(100, 732)} <image> {words(20, 733)}", (731,), 2, 40)
    return late, Ask(words(140, 732), (), 2, 40)


@pytest.mark.parametrize("shared", v2_cpu.reduced([False, True], to=[True]))
def test_a_request_preempted_in_the_step_that_encodes_its_picture(
    open_engine: OpenEngine, shared: bool
) -> None:
    engine = open_engine(
        GQA,
        2,
        scheduling_policy="priority",
        max_model_len=9 * BLOCK_SIZE,
        num_gpu_blocks_override=2 * 9 + 1,
        max_num_batched_tokens=2 * BLOCK_SIZE,
        max_num_seqs=4,
        long_prefill_token_threshold=BLOCK_SIZE,
    )
    late, important = priority_asks(shared)
    with engine.count_preemptions() as preempted:
        engine.add("late", late, priority=1)
        engine.step()
        engine.add("important", important, priority=0)
        for _ in range(3):
            engine.step()
        assert not preempted
        outputs = engine.step()
        assert preempted, "the step that was meant to preempt did not"
        outputs |= engine.drain()
    assert_exact(engine, [late, important], [outputs["late"], outputs["important"]])


@pytest.mark.parametrize("chunk", some([48, 97, 150], [97]))
def test_random_traffic_with_an_encoder_cache_of_one_picture(
    open_engine: OpenEngine, chunk: int
) -> None:
    engine = open_engine(
        LONG,
        2,
        kv_cache_memory_bytes=1700 << 10,
        enable_prefix_caching=True,
        max_num_batched_tokens=chunk,
        max_num_seqs=12,
    )
    went = traffic.run(engine, seed=3, requests=25, resets=0.02)
    assert went.preempted and went.resets and went.finished > 10
