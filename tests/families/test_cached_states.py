"""Qwen3.5 with prefix caching, as vLLM starts it: a hit needs a state, and a state is that of a whole prefix.

An engine in small: blocks of 64 tokens, steps of 160, two storage groups of one layer, six groups of states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine import v2_cpu
from tests.families.cached_states import (
    BLOCK,
    CLIFFS,
    TOKENS,
    Told,
    ask,
    dense,
    every_step,
    run,
    scheduler_of,
    sharing,
    started,
)
from tests.families.making import words
from vllm_flow.ranks import RANKS
from vllm_flow.ranks.base import Needs

if TYPE_CHECKING:
    from tests.families.making import Checkpoint
    from tests.families.running import Engine, Judge

OF_THE_PROMPT = tuple(name for name, rank in RANKS.items() if rank.needs == Needs.PROMPT)
"""Ranks whose choice depends on the question."""

slow = pytest.mark.skipif(
    v2_cpu.wanted(), reason="scheduling is the same, and V2's interpreter slow"
)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint_of("qwen3_5")


@pytest.fixture(scope="module")
def only_engine(checkpoint: Checkpoint) -> Engine:
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    return started(checkpoint, {"group_layers": 4}, kv_events_config=events)


@pytest.fixture
def engine(only_engine: Engine) -> Iterator[Engine]:
    """Its cache empty; every block is back after each test."""
    from vllm_flow.engine.inspect import check_integrity

    cache = only_engine.llm.llm_engine.vllm_config.cache_config
    assert (cache.mamba_cache_mode, cache.block_size) == ("align", BLOCK)
    assert only_engine.llm.reset_prefix_cache()
    yield only_engine
    only_engine.check_idle()
    check_integrity(only_engine.llm)


@pytest.fixture(scope="module")
def judge(only_engine: Engine) -> Judge:
    from tests.families.running import Judge

    return Judge(only_engine)


@pytest.mark.parametrize("cliff", CLIFFS)
def test_a_prompt_is_found_up_to_its_last_whole_block(
    engine: Engine, judge: Judge, cliff: int | None
) -> None:
    """195 tokens: steps end at 128, at 192, and with the prompt."""
    one = ask(1, after=75, cliff=cliff)
    assert run(engine, judge, one) == [0]
    assert run(engine, judge, one) == [192]
    assert run(engine, judge, replace(one, text=f"{one.text} {words(70, 7)}")) == [192]


def test_policies_share_nothing(engine: Engine, judge: Judge) -> None:
    """Not even where the picture leaves at neighbouring layers of one group of states."""
    for cliff in CLIFFS[:-1]:
        assert run(engine, judge, ask(2, cliff=cliff)) == [0], cliff
    # A request that evicts nothing is one without a policy.
    assert run(engine, judge, ask(2, cliff=8)) == [64]


@pytest.mark.parametrize("cliff", (None, 3))
def test_a_junction_gets_a_state_the_second_time(
    engine: Engine, judge: Judge, cliff: int | None
) -> None:
    """Three questions about one picture: the first step ran past the end of what they share."""
    asks = [ask(3, (4, 16), before=4, after=90, cliff=cliff, question=n) for n in range(3)]
    assert [run(engine, judge, one) for one in asks] == [[0], [0], [64]]


@pytest.mark.parametrize("cliff", (None, 0, 5))
def test_states_of_answers_are_found(engine: Engine, judge: Judge, cliff: int | None) -> None:
    """The answer fills the block that the prompt began; the next turn goes on behind it."""
    from vllm import SamplingParams

    first = ask(8, (6, 19), before=6, after=4 if v2_cpu.wanted() else 2, cliff=cliff)
    params = SamplingParams(
        temperature=0,
        max_tokens=6 + TOKENS,
        ignore_eos=True,
        allowed_token_ids=engine.checkpoint.word_ids,
        extra_args=first.keys,
    )
    with dense(engine):
        (output,) = engine.llm.generate([engine.prompt(first)], params, use_tqdm=False)
    ids = list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
    assert len(output.prompt_token_ids) < 2 * BLOCK < len(ids), "the answer fills no block"
    vocabulary = {index: word for word, index in engine.checkpoint.vocab.items()}
    said = " ".join(vocabulary[index] for index in output.outputs[0].token_ids)
    second = replace(first, text=f"{first.text} {said} {words(6, 8)}")
    assert run(engine, judge, second) == [2 * BLOCK]


def test_a_prefix_in_flight_is_waited_for(engine: Engine, judge: Judge) -> None:
    """Two of a prompt at once, with a policy and without: the second has what the first's step computed."""
    for cliff in (None, 3):
        assert run(engine, judge, *[ask(7, cliff=cliff)] * 2) == [0, 64]


def test_what_is_ranked_lies_across_blocks_in_one_step(engine: Engine, judge: Judge) -> None:
    """vLLM ends a step with a block of states; not inside a picture of which the device chooses what stays."""
    from tests.families.test_exact import BESIDE_STATES

    plain = ask(6, (5, 16), before=20, after=60)  # tokens 21 to 100 of 162
    for stages in BESIDE_STATES:
        one = replace(plain, stages=stages)
        assert run(engine, judge, one) == [0]
        # What the prompt's end ranks is computed with it, and no step ends with a block.
        ranked_last = any(name in stages for name in OF_THE_PROMPT)
        assert run(engine, judge, one) == [0 if ranked_last else 128], stages


def test_a_state_in_the_middle_of_a_block_is_nobodys(engine: Engine, judge: Judge) -> None:
    """A step ends before a picture that the prompt's end ranks, the next takes all that is left.

    The first block then holds a state of ten tokens, and must not be taken for that of 64.
    """
    plain = ask(9, (3, 10), before=10, after=122)  # of 162 tokens a step takes 160
    with dense(engine):
        for stages in ("4:50% last_prompt", "0:40% diversity"):
            one = replace(plain, stages=stages)
            first = run(engine, judge, one)
            assert [first, run(engine, judge, one)] == (
                [[0], [0]] if "prompt" in stages else [[0], [128]]
            )


def test_traffic_that_shares_prefixes_is_exact(engine: Engine, judge: Judge) -> None:
    """Between any two steps every block is accounted for, and of states nobody holds more than is read or written."""
    from vllm_flow.engine.inspect import check_integrity

    managers = scheduler_of(engine).kv_cache_manager.flow_groups.states

    def look() -> None:
        check_integrity(engine.llm)
        held = [blocks for manager in managers for blocks in manager.req_to_blocks.values()]
        assert max((sum(not block.is_null for block in of) for of in held), default=0) <= 3

    asks = sharing(8 if v2_cpu.wanted() else 32)
    with every_step(engine, look):
        first = run(engine, judge, *asks)
        again = run(engine, judge, *asks[::-1])
    assert sum(again) > sum(first)
    assert v2_cpu.wanted() or any(first), "nobody waited for another one's prefix"


@slow
def test_preempted_requests_find_their_own_states(engine: Engine, judge: Judge) -> None:
    scheduler = scheduler_of(engine)
    pool = scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 43)
    counted = []
    stock = scheduler._preempt_request

    def count(request: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(request.num_computed_tokens)
        return stock(request, *args, **kwargs)

    scheduler._preempt_request = count
    try:
        asks = [ask(30 + n, before=9, cliff=cliff) for n, cliff in enumerate((None, 5, None, 3))]
        outputs = engine.run(asks, 12)
    finally:
        del scheduler._preempt_request
        pool.free_blocks(taken)
    judge.assert_exact(asks, outputs)
    assert any(tokens >= BLOCK for tokens in counted), "nobody had filled a block: take fewer"


@slow
def test_a_full_pool_forgets_states_with_the_blocks_of_their_tokens(
    engine: Engine, judge: Judge
) -> None:
    """vLLM gives states back as soon as a request has another, so those go first; the last one goes with its tokens."""
    scheduler = scheduler_of(engine)
    pool = scheduler.kv_cache_manager.block_pool
    victim = ask(40, (3, 8), before=8, after=300, cliff=3)  # steps end at 128, 256, 320
    found = []
    with dense(engine):
        for spared in range(0, 40, 5):
            assert engine.llm.reset_prefix_cache()
            assert run(engine, judge, victim) == [0]
            pool.free_blocks(reversed(pool.get_new_blocks(pool.get_num_free_blocks() - spared)))
            found += run(engine, judge, victim)
    assert found == sorted(found) and set(found) == {0, 320}


@slow
def test_retained_states_are_those_that_the_operator_asked_for(
    engine: Engine, judge: Judge
) -> None:
    """``prefix_cache_retention_interval`` of 128 tokens: and the last one of a prompt, always."""
    with dense(engine, 128):
        for cliff in (None, 3):
            long = ask(50, (3, 8), before=8, after=300, cliff=cliff)  # steps end at 128, 256, 320
            first = replace(long, text=" ".join(long.text.split()[:190]))  # at 128, 192
            assert run(engine, judge, first) == [0]
            assert run(engine, judge, long) == [192]  # the first one's last
            assert run(engine, judge, long) == [320]


def test_events_tell_of_states_that_can_be_found(engine: Engine, judge: Judge) -> None:
    """Per group and block of tokens: stored once there is a state at its end, removed when it goes."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    from vllm_flow.engine.replacing import replaced

    scheduler = scheduler_of(engine)
    pool = scheduler.kv_cache_manager.block_pool
    told = Told()
    states = {
        manager.kv_cache_group_id for manager in scheduler.kv_cache_manager.flow_groups.states
    }
    with replaced("publish", [(scheduler.kv_event_publisher, told.publish)]):
        for cliff in (None, 3):
            before = set(told.entries)
            run(engine, judge, ask(60, after=75, cliff=cliff))
            # Steps end at 128 and 192, the last of which is kept; of keys there are three blocks.
            groups = [group for _, group in told.entries - before]
            assert {groups.count(group) for group in states} == {1}
            assert {groups.count(group) for group in set(groups) - states} == {3}
        # Until what was stored goes.
        pool.free_blocks(reversed(pool.get_new_blocks(pool.get_num_free_blocks() - 9)))
        run(engine, judge, ask(61, (2, 2)))
        left = {entry for entry in told.entries if entry[1] in states}
    assert left == {
        (maybe_convert_block_hash(key[:-4]), group)
        for key in pool.cached_block_hash_to_block._cache
        if (group := int.from_bytes(key[-4:], "big")) in states
    }
    assert 0 < len(left) < 2 * len(states)


def test_blocks_of_several_layers_are_copied_whole(checkpoint: Checkpoint) -> None:
    """A block that a hit will write is copied: of two layers with keys, and beside states smaller than a page."""
    from tests.families.running import Judge

    engine = started(checkpoint, {"group_layers": 8})
    groups = scheduler_of(engine).kv_cache_config.kv_cache_groups
    assert {len(group.layer_names) for group in groups} == {2}
    judge = Judge(engine)
    asks = [ask(80, cliff=cliff) for cliff in (None, 0, 2, 4, 7)]
    for cached in (0, 64):
        assert run(engine, judge, *asks) == [cached] * len(asks)
