"""Images that leave after the prefill: the first token is the baseline's, the others see what is left."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

from tests.engine import v2_cpu
from tests.engine.cases import LONG, LONG_ANSWER, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, assert_exact, differ, params_of, tokens_of
from tests.engine.policy_cases import late_mixed
from tests.engine.test_policies import CHUNKS, SMALL
from tests.engine.tiny_llava import SPECIALS, WORDS
from tests.longer import some
from tests.unit.staged_cases import Case
from tests.unit.test_rewriting import divisions, late_cases
from vllm_flow.engine.core.cache_keys import POSITION, insert
from vllm_flow.engine.core.late_blocks import LateBlocks
from vllm_flow.rewriting import Rewrite, is_rewritten

CACHED: dict[str, Any] = {"enable_prefix_caching": True}
LATE_CACHED = "cached-chunks-of-97-groups-of-3-async"
LATE: dict[str, tuple[int, dict[str, Any]]] = {
    "groups-of-2": (2, {}),
    SMALL: CHUNKS[SMALL],
    LATE_CACHED: (
        3,
        dict(CACHED, max_num_batched_tokens=97, max_num_seqs=12, async_scheduling=True),
    ),
    "cached-one-group": (6, CACHED),
    "not-chunked-groups-of-1": (1, {"enable_chunked_prefill": False}),
}


@pytest.mark.parametrize("name", v2_cpu.reduced(some(LATE, [LATE_CACHED]), to=["groups-of-2"]))
def test_what_leaves_after_the_prefill_is_exact(open_engine: OpenEngine, name: str) -> None:
    """The whole prompt sees the image, what follows it does not; beside policies of the prefill."""
    group_layers, options = LATE[name]
    engine = open_engine(LONG, group_layers, **options)
    asks = late_mixed(LONG.layers)
    asks = v2_cpu.reduced(asks, to=[replace(ask, max_tokens=8) for ask in asks[1:18:4]])
    for run in (engine.run_joining, engine.run):
        assert assert_exact(engine, asks, run(asks), ties=True) >= len(asks) * 0.8


def test_a_late_eviction_is_another_answer(open_engine: OpenEngine) -> None:
    """A control of the oracle: neither the baseline's answer nor that of the same cliff in the prefill."""
    engine = open_engine(LONG, 2)
    ask = one_image(130, 1)
    asks = [
        ask,
        replace(ask, late=True),
        replace(ask, cliff=None),
        replace(ask, late=True, cliff=3),
    ]
    outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    assert all(itertools.starmap(differ, itertools.combinations(outputs, 2)))


def test_a_late_eviction_shares_the_baselines_prefixes(open_engine: OpenEngine) -> None:
    """Both ways, with any cliff, and after its own blocks were exchanged; never with a prefill's policy."""
    engine = open_engine(LONG, 2, **CACHED)
    plain = one_image(531, before=40, after=40)
    tokens = 1 + 40 + LONG.image_tokens + 40
    same = (tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    late, deeper = replace(plain, cliff=1, late=True), replace(plain, cliff=4, late=True)
    kept = replace(plain, stages="2:50% uniform, 5:0", late=True, samples=2)
    ranked = replace(plain, stages="2:30% last_prompt", late=True)
    for ask, hit in (
        (late, 0),
        (plain, same),
        (deeper, same),
        (kept, same),
        (ranked, (tokens - 2) // BLOCK_SIZE * BLOCK_SIZE),  # two tokens to be read
        (replace(plain, cliff=1), 0),
    ):
        (output,) = engine.run([ask])
        assert_exact(engine, [ask], [output])
        assert output.num_cached_tokens == hit


def test_nobody_finds_what_a_late_eviction_answered(open_engine: OpenEngine) -> None:
    """A next turn repeats the answer, and computes it with the image."""
    engine = open_engine(LONG, 2, **CACHED)
    late = replace(one_image(533, 1, before=40, after=40), late=True, allowed=(20,), max_tokens=70)
    (output,) = engine.run([late])
    assert set(tokens_of(output)) == {20}
    turn = " ".join([late.prompt, *[WORDS[20 - len(SPECIALS)]] * 70])
    for ask in (replace(late, prompt=turn, allowed=None), one_image(533)):
        ask = replace(ask, prompt=turn, max_tokens=8)
        (output,) = engine.run([ask])
        assert_exact(engine, [ask], [output])
        before = len(late.prompt.split()) + LONG.image_tokens
        assert len(output.prompt_token_ids) == before + 70
        if ask.late:
            assert output.num_cached_tokens == before // BLOCK_SIZE * BLOCK_SIZE


def test_who_was_preempted_does_not_find_the_baselines_answer(open_engine: OpenEngine) -> None:
    """Both say the same words, and the baseline's were computed with the image."""
    engine = open_engine(LONG, 2, **CACHED)
    plain = replace(one_image(537, before=40, after=40), allowed=(20,), max_tokens=70)
    late = replace(plain, cliff=1, late=True)
    engine.run([plain])
    engine.add("victim", late)
    for _ in range(60):
        engine.step()
    scheduler = engine.scheduler
    [request] = scheduler.requests.values()
    assert request.num_tokens > request.num_prompt_tokens + BLOCK_SIZE
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    scheduler.prev_step_scheduled_req_ids.clear()  # as when a reset preempts between steps
    _, hit, _ = scheduler.kv_cache_manager.get_computed_blocks(request)
    assert hit == (request.num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    outputs = engine.drain()
    assert_exact(engine, [late], [outputs["victim"]], ties=True)


@pytest.mark.parametrize("cached", some([False, True], [True]))
def test_late_evictions_in_a_pool_that_thrashes(open_engine: OpenEngine, cached: bool) -> None:
    """What was preempted computes its prompt with the image anew, and what it had answered without."""
    options = {"kv_cache_memory_bytes": 2 << 20, "enable_prefix_caching": cached}
    engine = open_engine(LONG, 2, **options)
    cliffs = (1, 2, 3, 0, None)
    asks = [
        replace(one_image(540 + i % 5, cliffs[i % 5]), late=i % 5 < 4, max_tokens=LONG_ANSWER)
        for i in range(15)
    ]
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted, "the pool is too large for this test"
    assert_exact(engine, asks, outputs)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_what_left_after_the_prefill_is_told(
    open_engine: OpenEngine, length: int, asynchronous: bool
) -> None:
    """No row was saved, and no block before the second token was computed."""
    options = {"async_scheduling": True} if asynchronous else {}
    engine = open_engine(LONG, 2, **options)
    ask = replace(one_image(67), stages="1:50% uniform, 4:0", late=True, max_tokens=length)
    (output,) = engine.run([ask])
    assert_exact(engine, [ask], [output])
    found = output.kv_transfer_params["vllm_flow"]
    computed = len(output.prompt_token_ids) + length - 1
    left = (144, 72, 0) if length > 1 else (144, 144, 144)
    held = [-(-(computed - LONG.image_tokens + kept) // BLOCK_SIZE) for kept in left]
    assert (found["when"], found["kv_blocks"]) == ("decode", held)
    assert found["kv_blocks_saved"] == 3 * -(-computed // BLOCK_SIZE) - sum(held)
    assert found["prefill_rows_saved"] == 0
    assert found["image_tokens_evicted"] == LONG.image_tokens - left[-1]
    assert [stage["image_tokens_kept"] for stage in found["stages"]] == (
        [72, 0] if length > 1 else [144, 144]
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_late_eviction_may_end_with_its_first_token(
    open_engine: OpenEngine, asynchronous: bool
) -> None:
    """By a stop token, which an asynchronous scheduler hears of when the image has left."""
    options = {"async_scheduling": True} if asynchronous else {}
    engine = open_engine(LONG, 2, **CACHED, **options)
    ask = replace(one_image(68, 2), late=True, max_tokens=3)
    (output,) = engine.run([ask])
    params = params_of(ask)
    params.stop_token_ids = [tokens_of(output)[0]]
    (stopped,) = engine.llm.generate(engine.prompt(ask), params, use_tqdm=False)
    assert tokens_of(stopped) == tokens_of(output)[:1]
    engine.check_idle()
    for steps in range(1, 5):
        engine.add(f"late-{steps}", ask)
        for _ in range(steps):
            engine.step()
        engine.abort(f"late-{steps}")
    engine.check_idle()
    assert_exact(engine, [ask], engine.run([ask]))


@settings(max_examples=40)
@given(late_cases(), divisions(), st.integers(1, 7), st.data())
def test_a_computed_prompts_blocks_are_exchanged_once(
    case: Case, division: tuple[int, int], size: int, data: st.DataObject
) -> None:
    """Those before the first token that leaves stay, those that others hold stay theirs, and the group is told."""
    layout, (first, layers) = case.layout, division
    assert layout is not None
    spec: Any = SimpleNamespace(first_layer=first, last_layer=first + layers - 1)
    pool = BlockPool(3 * case.prompt + 9, True, size)
    late, now = LateBlocks(spec, pool, size), case.prompt + 1
    held = pool.get_new_blocks(-(-case.prompt // size))
    for index, block in enumerate(held):  # what nobody finds goes to the next one who asks
        insert(pool, block, [BlockHash(bytes([index]))], POSITION, 0, (index + 1) * size)
    others = held[: data.draw(st.integers(0, len(held)))]  # a prefix, as they are shared
    pool.touch(others)
    assert not late.leave_before("a", None, now) and not late.leave_before("a", layout, now - 1)
    leaves = late.leave_before("a", layout, now)
    assert leaves == is_rewritten(layout, spec.last_layer)
    if not leaves:
        return
    needed, before, free = late.need(layout, now, held), list(held), pool.get_num_free_blocks()
    assert max(free - needed.net, 0) == free - needed.net
    new = late.exchange("a", layout, now, held)
    old = before[needed.kept :]
    assert held == before[: needed.kept] + new and len(new) == needed.new
    assert len(held) == -(-layout.stored_tokens(now, first) // size)
    given_back = [block for block in old if block not in others]
    assert pool.get_num_free_blocks() == free + len(given_back) - len(new)
    # The end of a prompt is given away first, so that its beginning can be found for longest.
    there = pool.free_block_queue.get_all_free_blocks()
    assert there[len(there) - len(given_back) :] == given_back[::-1]
    assert all(block.ref_cnt == 1 for block in (*new, *others[needed.kept :]))
    assert late.have_left("a") and not late.leave_before("a", layout, now)
    ids = [tuple(block.block_id for block in blocks) for blocks in (old, new)]
    late.exchange("b", layout, now, pool.get_new_blocks(len(before)))
    late.forget("b")
    assert not late.have_left("b")
    assert late.take_rewrites() == {"a": Rewrite(needed.kept, *ids)}
    assert late.take_rewrites() == {} and late.have_left("a")
