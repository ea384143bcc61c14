"""Every accepted request finishes, however small the pool, and reads what it must.

Without a model, but for the last test.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest
from vllm.config import SpeculativeConfig

from tests.engine.bare_prompts import prompt
from tests.engine.bare_scheduler import LAYERS, LENGTH, BareScheduler, OpenBare
from tests.engine.cases import LONG, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, assert_exact
from tests.engine.options import DRAFTS
from tests.longer import some
from vllm_flow.layout import TokenLayout

GROUPS = (1, 2, 3, 6)
SEEDS = int(os.environ.get("VLLM_FLOW_ADMISSION_SEEDS", "2"))
"""Runs of random traffic per engine; some seconds each."""
CLIFFS = range(LAYERS + 1)


@pytest.mark.parametrize("group_layers", some(GROUPS, [1, 3]))
def test_the_same_prompt_again_in_every_small_pool(bare: OpenBare, group_layers: int) -> None:
    """All cliffs, images and pools: the hit's copies never keep the second request out."""
    tokens = [prompt(40, 144, 286), prompt(0, 200, 290), prompt(70, 144, 97), prompt(33, 330, 110)]
    for cliff, spare in itertools.product(CLIFFS, (0, 2, 7)):
        engine = bare(group_layers, spare)
        for index, one in enumerate(tokens):
            for turn in range(3):
                engine.add(f"{index}-{turn}", one, cliff)
                engine.drain()
            reused = [engine.stats[f"{index}-{turn}"].num_cached_tokens for turn in (1, 2)]
            # As much as in a pool with room: every whole block before the last token.
            assert reused == [(len(one) - 1) // BLOCK_SIZE * BLOCK_SIZE] * 2, (cliff, spare, index)


def random_traffic(engine: BareScheduler, rng: np.random.Generator, requests: int) -> int:
    """Requests that share beginnings, arrive together, are aborted, and answer at length."""
    live: list[str] = []
    sent = preempted = 0
    for _ in range(3000):
        while sent < requests and rng.random() < 0.4:
            name = str(sent)
            image = int(rng.choice([0, 60, 144, 200]))
            shared = prompt(int(rng.choice([0, 20, 45])), image, int(rng.integers(1, 60)))
            own = [9 + int(rng.integers(2))] * int(rng.integers(1, 120))
            cliff = None if rng.random() < 0.2 else int(rng.integers(LAYERS + 1))
            count = int(rng.integers(1, 100))
            answer = [int(token) for token in rng.integers(20, 22, size=count)]
            tokens = shared + own
            engine.add(name, tokens, cliff, answer[: LENGTH - len(tokens)])
            live.append(name)
            sent += 1
        engine.step()
        live = [name for name in live if name in engine.scheduler.requests]
        if live and rng.random() < 0.02:
            victim = live.pop(int(rng.integers(len(live))))
            engine.abort(victim)
        if sent == requests and not engine.scheduler.requests:
            break
    preempted = sum(one.request.num_preemptions for one in engine.sent.values())
    engine.drain()
    return preempted


STEPS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "asynchronous": {"asynchronous": True},
    "drafts": {"speculative_config": DRAFTS},
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("group_layers", some(GROUPS, [3]))
def test_random_traffic_finishes(bare: OpenBare, group_layers: int, steps: str) -> None:
    """In pools of all sizes, whole prompts and chunks; a slot that is read wrongly fails the step."""
    preempted = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        options = dict(STEPS[steps])
        if seed % 2:
            options["long_prefill_token_threshold"] = 70
        engine = bare(group_layers, int(rng.integers(12)), **options)
        preempted += random_traffic(engine, rng, 25)
        for name, one in engine.sent.items():
            if name not in engine.aborted:
                assert engine.answers[name] == list(one.answer)
        assert any(one.drafted for one in engine.sent.values()) == (steps == "drafts")
    assert preempted, "no pool was small enough"


@pytest.mark.parametrize("reserve", [True, False])
def test_a_hit_on_running_and_ended_requests(bare: OpenBare, reserve: bool) -> None:
    """Partly on blocks that are held, partly on idle ones; the pool has room for few."""
    first = prompt(40, 144, 60)
    longer = [*first, *[9] * 60]
    taken = 0
    for cliff, spare in itertools.product((0, 1, 3, 5), (0, 1, 3)):
        engine = bare(6, spare, scheduler_reserve_full_isl=reserve)
        engine.add("runs", first, cliff, answer=[7] * 40)
        engine.step()
        engine.add("ended", longer, cliff, answer=[7, 7])
        while "ended" in engine.scheduler.requests:
            engine.step()
        assert "runs" in engine.scheduler.requests
        engine.add("last", [*longer, 11], cliff, answer=[8] * 3)
        engine.step()
        taken += any("last" in manager._takes_over for manager in engine.managers)
        engine.drain()
        assert {name: len(answer) for name, answer in engine.answers.items()} == {
            "runs": 40,
            "ended": 2,
            "last": 3,
        }
    assert taken, "every pool had room"


@pytest.mark.parametrize("group_layers", some(GROUPS, [3]))
def test_blocks_of_a_request_preempted_in_the_step_that_fills_them(
    bare: OpenBare, group_layers: int
) -> None:
    """The more important one needs a block more in the step that was to compute two of the other one's, which comes
    by them again when there is room: nobody has filled them."""
    engine = bare(
        group_layers,
        LAYERS // group_layers,
        scheduling_policy="priority",
        long_prefill_token_threshold=2 * BLOCK_SIZE,
    )
    # As a third one, with which vLLM cuts prompts by its threshold.
    engine.add("beside", [9, 9, 9], answer=[7] * 25)
    tokens = prompt(200, 144, 136)
    victim = engine.add("victim", tokens, priority=1)
    engine.step()
    engine.add("important", [*range(600, 726)], answer=[7] * 8, priority=0)
    for _ in range(4):
        assert "victim" in engine.step()
    done = victim.num_computed_tokens
    assert done < len(tokens)
    assert "victim" not in engine.step()
    assert victim.num_preemptions == 1
    engine.drain()
    assert engine.answers["victim"] == [7, 8, 9, 10]


@pytest.mark.parametrize("cliff", range(LAYERS))
def test_a_follower_waits_only_while_somebody_computes(bare: OpenBare, cliff: int) -> None:
    """Not for a prefix that was given up and is gone from the cache."""
    engine = bare(2, 0, long_prefill_token_threshold=70)
    tokens = prompt(40, 144, 300)
    engine.add("leader", tokens, cliff)
    engine.add("follower", tokens, cliff)
    assert engine.step() == ["leader"]
    assert engine.scheduler.requests["leader"].num_computed_tokens < len(tokens)
    engine.abort("leader")
    assert engine.scheduler.kv_cache_manager.reset_prefix_cache(), "somebody holds blocks"
    assert engine.step() == ["follower"]
    engine.drain()


@pytest.mark.parametrize("steps", ["one by one", "drafts"])
def test_a_turn_that_comes_while_a_block_fills_waits_for_it(bare: OpenBare, steps: str) -> None:
    """It repeats all that was said so far, the last token of which is being computed: no copy of its block yet."""
    for cliff in CLIFFS[:-1]:
        engine = bare(2, 20, **STEPS[steps])
        first = engine.add("first", prompt(40, 144, 55), cliff, answer=[7, 8, 9, 10] * 20)
        engine.step()
        while first.num_tokens % BLOCK_SIZE:
            assert engine.step() == ["first"], "no step began with whole blocks"
        said = [*first.all_token_ids]
        engine.add("turn", [*said, 11], cliff)
        assert engine.step() == ["first"]
        assert bool(engine.sent["first"].drafted) == (steps == "drafts")
        assert "turn" in engine.step()
        engine.drain()
        assert engine.stats["turn"].num_cached_tokens == len(said)


@pytest.mark.parametrize("slots", [0, 1])
@pytest.mark.parametrize("others", [0, 2])
def test_the_longest_that_is_accepted_fits_a_step_beside_drafts(
    bare: OpenBare, monkeypatch: pytest.MonkeyPatch, others: int, slots: int
) -> None:
    """Of each request, a draft model takes one of a step's inputs more than the request has tokens in it."""
    monkeypatch.setattr(SpeculativeConfig, "max_num_new_slots_for_drafting", slots)
    options = dict(max_num_batched_tokens=100 + slots, max_num_seqs=1 + others)  # a config each
    engine = bare(2, 60, **STEPS["drafts"], **options)
    answering = {str(number) for number in range(others)}
    for name in sorted(answering):
        engine.add(name, prompt(9, 0, 9), answer=[7, 8] * 60)
    engine.step()
    assert engine.settings is not None
    room = engine.settings.engine.step_tokens
    assert room == 100 + slots - others * 4 - (1 + others) * slots
    engine.add("longest", prompt(0, room - 9, 9), answer=[7], flow_stages="2:50% last_prompt")
    for _ in range(3):
        assert answering <= set(engine.step())
    assert "longest" not in engine.scheduler.requests, "no step has room for it"
    engine.drain()


@pytest.mark.parametrize("cliff", [0, 1, 3, 5])
def test_only_idle_blocks_are_taken_over(bare: OpenBare, cliff: int) -> None:
    """The others are copied, and the count of blocks to come is right to the block."""
    for held_by_others in range(8):
        engine = bare(6, 20)
        tokens = prompt(37, 144, 60)
        engine.add("first", tokens, cliff)
        engine.drain()
        request = engine.add("second", tokens, cliff)
        cache, (manager,) = engine.scheduler.kv_cache_manager, engine.managers
        hit, num_tokens, _ = cache.get_computed_blocks(request)
        (blocks,) = hit.blocks
        others = [*blocks[held_by_others::2]]
        cache.block_pool.touch(others)
        manager.take_over("second", True)
        new = len(tokens) - num_tokens
        needed = cache.coordinator.get_num_blocks_to_allocate(
            "second", len(tokens), hit.blocks, 0, num_tokens, num_tokens, len(tokens)
        )
        free = cache.block_pool.get_num_free_blocks()
        assert cache.allocate_slots(request, new, num_tokens, hit) is not None
        assert free - cache.block_pool.get_num_free_blocks() == needed
        first_written = request_layout(engine, "second").stored_tokens(num_tokens, 5) // BLOCK_SIZE
        copied = [block for block in blocks[first_written:] if block in others]
        assert [source for source, _ in manager._pending_cow_copies] == copied
        kept = manager.req_to_blocks["second"][: len(blocks)]
        assert [block for block in blocks if block not in kept] == copied


def request_layout(engine: BareScheduler, request_id: str) -> TokenLayout:
    layout = engine.sent[request_id].layout
    assert layout is not None
    return layout


@pytest.mark.parametrize("cliff", some([3, 1, 5, 0], [3]))
def test_a_real_engine_with_a_pool_of_one_request(open_engine: OpenEngine, cliff: int) -> None:
    """What the model reads from blocks that were taken over."""
    page = 2 * 2 * 32 * 4 * BLOCK_SIZE  # keys and values, heads, width, bytes
    blocks = LENGTH // BLOCK_SIZE + 1
    engine = open_engine(
        LONG, 6, kv_cache_memory_bytes=blocks * 6 * page, enable_prefix_caching=True
    )
    ask = one_image(620 + cliff, cliff, before=40, after=284)
    for turn in range(2):
        (output,) = engine.run([ask])
        assert_exact(engine, [ask], [output])
        assert bool(output.num_cached_tokens) == bool(turn)
