"""Qwen3.5 with drafts: a state goes on from the last draft that was accepted, and past a cliff it has no image in it.

vLLM's kernels for drafts beside states are CUDA's: `gated_delta` and `state_copies` stand in for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine import v2_cpu
from tests.families.drafted_states import (
    ALL,
    CACHING,
    GUESSES,
    KINDS,
    QUICK,
    TOKENS,
    Way,
    ask,
    counted,
    metadata_of_states,
    name_of,
    scheduler_of,
)
from tests.families.making import words
from tests.longer import some

if TYPE_CHECKING:
    from tests.families.making import Checkpoint
    from tests.families.running import Engine, Judge

pytestmark = pytest.mark.skipif(v2_cpu.wanted(), reason="drafts beside states run under V1")


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    """Answers are made of three words, so that what was said before is often right."""
    from tests.families.test_drafters import of_few_words

    return of_few_words(checkpoint_of("qwen3_5"))


@pytest.fixture(scope="module")
def drafting(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same with a layer that drafts."""
    from tests.families.next_token import qwen3_5

    return qwen3_5(checkpoint, tmp_path_factory.mktemp("mtp") / "qwen3_5")


@pytest.fixture(scope="module")
def open_way(checkpoint: Checkpoint, drafting: Checkpoint) -> Callable[[Way], Engine]:
    """Blocks of 64 tokens and steps of 160; without a prefix cache steps of 36, in blocks without an end."""
    from tests.families.running import Engine

    opened: dict[Way, Engine] = {}

    def get(way: Way) -> Engine:
        method, asynchronous, caching = way
        if way not in opened:
            opened[way] = Engine(
                drafting if method == "mtp" else checkpoint,
                group_layers=4,
                max_num_batched_tokens=160 if caching else 36,
                max_num_seqs=8,
                enable_prefix_caching=None if caching else False,
                async_scheduling=asynchronous,
                speculative_config=KINDS[method] | {"num_speculative_tokens": GUESSES},
            )
            opened[way].checkpoint = checkpoint
        return opened[way]

    return get


@pytest.fixture
def engine(request: Any, open_way: Callable[[Way], Engine]) -> Iterator[Engine]:
    """Its cache empty; every block is back after each test."""
    from vllm_flow.engine.inspect import check_integrity

    found = open_way(request.param)
    assert found.llm.reset_prefix_cache()
    yield found
    found.check_idle()
    check_integrity(found.llm)


@pytest.fixture(scope="module")
def judge(open_way: Callable[[Way], Engine]) -> Judge:
    from tests.families.running import Judge

    return Judge(open_way(QUICK))


by_all = pytest.mark.parametrize("engine", some(ALL, [QUICK]), indirect=True, ids=name_of)
by_caching = pytest.mark.parametrize("engine", some(CACHING, [QUICK]), indirect=True, ids=name_of)
by_quick = pytest.mark.parametrize("engine", [QUICK], indirect=True, ids=name_of)


@by_all
def test_answers_are_exact_whatever_was_drafted(engine: Engine, judge: Judge) -> None:
    """More requests than run at once: image rows of some leave in steps that check drafts of others."""
    shapes = [(5, 8, 0), (4, 3, 3), (5, 7, 0), (6, 15, 4), (2, 2, 9), (3, 8, 1)]
    cliffs = (0, None, 3, 5, 1, 7, 4, 8, 2, 6)
    asks = [ask(10 + n, *shapes[n % len(shapes)], cliff=cliff) for n, cliff in enumerate(cliffs)]
    with counted(engine) as drafted, metadata_of_states(engine) as made:
        outputs = engine.run(asks, TOKENS)
    judge.assert_exact(asks, outputs)
    assert drafted.accepted > 20 and drafted.tokens - drafted.accepted > 20, drafted
    mixed = [m for m in made if m.num_spec_decodes and m.num_prefills]
    assert mixed, "no step checked drafts beside a prompt that lost rows"
    assert any((m.num_accepted_tokens > 1).any() for m in mixed)


@by_caching
def test_a_prompt_is_found_among_requests_of_one_policy(engine: Engine, judge: Judge) -> None:
    """195 tokens: vLLM finds them up to the last whole block, with a drafter up to the one before."""
    from tests.families.cached_states import ask as long

    # vLLM 0.33 hashes a block with the token behind it, and goes without one no more.
    whole = 192 - (64 if scheduler_of(engine).use_eagle_block_drop else 0)
    for cached in (0, whole):
        for cliff in (None, 0, 5):
            one = long(1, after=75, cliff=cliff)
            (output,) = engine.run([one], TOKENS)
            judge.assert_exact([one], [output])
            assert output.num_cached_tokens == cached, cliff
    one = long(1, after=75, cliff=3)
    (output,) = engine.run([one], TOKENS)
    judge.assert_exact([one], [output])
    assert output.num_cached_tokens == 0


@pytest.mark.long
@pytest.mark.parametrize("engine", CACHING, indirect=True, ids=name_of)
def test_answers_that_fill_blocks_are_exact(engine: Engine, judge: Judge) -> None:
    """80 tokens, then a turn that goes on behind them: among them boundaries that drafts step over."""
    from vllm import SamplingParams

    from tests.families.cached_states import ask as long
    from tests.families.cached_states import dense

    vocabulary = {index: word for word, index in engine.checkpoint.vocab.items()}
    found = []
    for seed, cliff in enumerate((None, 0, 3, 5)):
        first = long(70 + seed, (6, 19), before=6, after=2 + 9 * seed, cliff=cliff)
        params = SamplingParams(
            temperature=0,
            max_tokens=80,
            ignore_eos=True,
            allowed_token_ids=engine.checkpoint.word_ids,
            extra_args=first.keys,
        )
        with dense(engine):
            (output,) = engine.llm.generate([engine.prompt(first)], params, use_tqdm=False)
        said = " ".join(vocabulary[index] for index in output.outputs[0].token_ids)
        second = replace(first, text=f"{first.text} {said} {words(6, 8)}")
        (output,) = engine.run([second], TOKENS)
        judge.assert_exact([second], [output])
        found.append(output.num_cached_tokens)
    assert max(found[1:]) >= 128, found


@pytest.mark.long
@pytest.mark.parametrize("engine", CACHING, indirect=True, ids=name_of)
def test_traffic_that_shares_prefixes_is_exact(engine: Engine, judge: Judge) -> None:
    """Between any two steps every block is accounted for."""
    from tests.families.cached_states import every_step, sharing
    from vllm_flow.engine.inspect import check_integrity

    asks = sharing(32)
    cached = []
    with every_step(engine, lambda: check_integrity(engine.llm)):
        for asked in (asks, asks[::-1]):
            outputs = engine.run(asked, TOKENS)
            judge.assert_exact(asked, outputs)
            cached.append(sum(output.num_cached_tokens for output in outputs))
    assert cached[1] > cached[0]


@pytest.mark.long
@pytest.mark.parametrize("engine", ALL, indirect=True, ids=name_of)
def test_preempted_requests_build_their_states_anew(engine: Engine, judge: Judge) -> None:
    scheduler = scheduler_of(engine)
    pool = scheduler.kv_cache_manager.block_pool
    keys = len(scheduler.kv_cache_manager.flow_groups.managers)
    # Three prompts: each takes two blocks of each storage group, and of each of six groups of states one and as many
    # as there are drafts. Their answers need more.
    three = 3 * (2 * keys + 6 * (1 + GUESSES))
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - three - 6)
    counts = [0]
    stock = scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> Any:
        counts[0] += 1
        return stock(*args, **kwargs)

    scheduler._preempt_request = count
    try:
        asks = [
            ask(30 + n, 6, 19, before=6, cliff=cliff) for n, cliff in enumerate((None, 5, None, 3))
        ]
        outputs = engine.run(asks, 80)
    finally:
        del scheduler._preempt_request
        pool.free_blocks(taken)
    judge.assert_exact(asks, outputs)
    assert counts[0], "nothing was preempted: take more blocks"


@pytest.mark.long
@pytest.mark.parametrize("method", KINDS)
def test_without_a_policy_answers_are_stock_vllms(
    open_way: Callable[[Way], Engine], checkpoint: Checkpoint, drafting: Checkpoint, method: str
) -> None:
    from tests.families.running import STOCK, Engine, largest_difference

    stock = Engine(
        drafting if method == "mtp" else checkpoint,
        STOCK,
        max_num_batched_tokens=160,
        max_num_seqs=8,
        enable_prefix_caching=None,
        async_scheduling=False,
        speculative_config=KINDS[method] | {"num_speculative_tokens": GUESSES},
    )
    stock.checkpoint = checkpoint
    asks = [ask(80 + n, 5, 8, before=n) for n in range(6)]
    ours = open_way((method, False, True)).run(asks, TOKENS)
    assert largest_difference(ours, stock.run(asks, TOKENS)) < 1e-4


@by_quick
def test_a_drafter_is_stored_before_the_layers_with_keys(engine: Engine, judge: Judge) -> None:
    """In a group of its own, whose blocks hold the picture whatever is evicted."""
    from vllm_flow.engine.inspect import footprints
    from vllm_flow.engine.states import is_state

    groups = scheduler_of(engine).kv_cache_config.kv_cache_groups
    keys = [group.layer_names for group in groups if not is_state(group.kv_cache_spec)]
    assert sorted(sum("mtp." in name for name in names) for names in keys) == [0, 0, 1]
    asks = [ask(90, 6, 19, before=6, cliff=cliff) for cliff in (None, 0, 5)]
    outputs = engine.run(asks, 1)
    judge.assert_exact(asks, outputs)
    by_cliff = {taken.cliff: taken.blocks for taken in list(footprints(engine.llm).values())[-3:]}
    assert by_cliff == {8: (2, 2, 2), 0: (2, 1, 1), 5: (2, 2, 1)}
    reports = [(output.kv_transfer_params or {})["vllm_flow"] for output in outputs[1:]]
    assert [report["kv_blocks_saved"] for report in reports] == [2, 1]


@pytest.mark.long
def test_a_group_that_vllm_divides_for_the_drafter_is_exact(tmp_path: Path) -> None:
    """Four layers with keys, two in a group, and the drafter's: vLLM stores three layers in two groups."""
    from tests.families import making, qwen
    from tests.families.next_token import qwen3_5
    from tests.families.running import Engine, Judge
    from tests.families.test_drafters import of_few_words
    from vllm_flow.engine.inspect import check_integrity, footprints

    made = making.save(qwen.qwen3_5(num_hidden_layers=16), tmp_path / "deep")
    deep = of_few_words(made)
    engine = Engine(
        qwen3_5(deep, tmp_path / "drafting"),
        group_layers=8,
        max_num_batched_tokens=160,
        max_num_seqs=8,
        enable_prefix_caching=None,
        kv_cache_memory_bytes=48 << 20,
        speculative_config=KINDS["mtp"] | {"num_speculative_tokens": GUESSES},
    )
    engine.checkpoint = deep
    scheduler = scheduler_of(engine)
    specs = [manager.spec for manager in scheduler.flow_groups.managers]
    groups = tuple((spec.first_layer, spec.last_layer) for spec in specs)
    assert groups == scheduler.flow_settings.groups == ((-1, 7), (-1, 7), (11, 15))
    kv_groups = scheduler.kv_cache_config.kv_cache_groups
    assert max(len(group.layer_names) for group in kv_groups) == 2
    assert scheduler.flow_settings.layers_per_block == 2
    asks = [ask(60, 6, 19, before=6, cliff=cliff) for cliff in (None, 0, 5, 9, 11, 13)]
    for cached in (0, 0, 64):  # a drafter's last whole block is not found
        outputs = engine.run(asks, TOKENS)
        Judge(engine).assert_exact(asks, outputs)
        assert {output.num_cached_tokens for output in outputs} <= {0, cached}
    held = {taken.cliff: taken.blocks for taken in list(footprints(engine.llm).values())[-6:]}
    assert held[16] == held[13] == (3, 3, 3) and held[0] == held[11] == (3, 3, 1)
    (output,) = (output for one, output in zip(asks, outputs, strict=True) if one.cliff == 11)
    assert (output.kv_transfer_params or {})["vllm_flow"]["kv_blocks_saved"] == 2
    engine.check_idle()
    check_integrity(engine.llm)
