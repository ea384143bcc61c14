"""Qwen3.5 beside a KV connector: requests without a policy store and load states; those that evict are not heard of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine import v2_cpu
from tests.families.cached_states import ask

if TYPE_CHECKING:
    from tests.families.making import Checkpoint
    from tests.families.running import Ask, Engine, Judge
    from tests.families.state_connector import StateConnector

pytestmark = pytest.mark.skipif(v2_cpu.wanted(), reason="the scheduler's half is the same")
TOKENS = 4


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint_of("qwen3_5")


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from vllm.distributed.kv_transfer import kv_transfer_state

    from tests.families.running import Engine

    yield Engine(
        checkpoint,
        group_layers=4,
        max_num_batched_tokens=160,
        max_num_seqs=8,
        enable_prefix_caching=None,
        kv_transfer_config={
            "kv_connector": "StateConnector",
            "kv_connector_module_path": "tests.families.state_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"folder": str(tmp_path_factory.mktemp("blocks"))},
        },
    )
    kv_transfer_state._KV_CONNECTOR_AGENT = None  # one per process: other engines have none


@pytest.fixture(scope="module")
def judge(engine: Engine) -> Judge:
    from tests.families.running import Judge

    return Judge(engine)


@pytest.fixture
def connector(engine: Engine) -> Iterator[StateConnector]:
    """Every block is back after each test."""
    from vllm_flow.engine.core.connectors import FlowConnector
    from vllm_flow.engine.inspect import check_integrity

    found: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler.connector
    assert isinstance(found, FlowConnector)
    assert engine.llm.reset_prefix_cache()
    found.known.clear()
    found.loaded.clear()
    yield found
    engine.check_idle()
    check_integrity(engine.llm)


def run(engine: Engine, judge: Judge, asks: list[Ask]) -> list[int]:
    """Tokens that each of some requests did not compute; their answers are exact."""
    outputs = engine.run(asks, TOKENS)
    judge.assert_exact(asks, outputs)
    return [output.num_cached_tokens for output in outputs]


def test_requests_without_a_policy_load_what_an_empty_cache_lacks(
    engine: Engine, judge: Judge, connector: StateConnector
) -> None:
    cliffs = (None, 0, 3, 5, 8)  # the last one evicts nothing
    asks = [ask(10 + n, before=6 + n, after=75, cliff=cliff) for n, cliff in enumerate(cliffs)]
    assert run(engine, judge, asks) == [0] * 5
    assert len(connector.known) == 2 and not connector.loaded
    assert engine.llm.reset_prefix_cache()
    assert run(engine, judge, asks) == [192, 0, 0, 0, 192]
    assert len(connector.known) == 4 and [tokens for _, tokens in connector.loaded] == [192, 192]
    # Those that evict find what the engine itself has kept.
    assert run(engine, judge, asks) == [192] * 5
    assert len(connector.loaded) == 2


def test_what_is_here_is_not_loaded(
    engine: Engine, judge: Judge, connector: StateConnector
) -> None:
    """A beginning of the prompt is in the cache, with a state; the rest comes from elsewhere."""
    whole = ask(20, before=6, after=75)
    assert run(engine, judge, [whole]) == [0]
    assert engine.llm.reset_prefix_cache()
    beginning = replace(whole, text=" ".join(whole.text.split()[:14]))
    assert run(engine, judge, [beginning]) == [0]
    kept = 64 * ((len(judge.prompt(beginning).ids) - 1) // 64)
    assert run(engine, judge, [whole]) == [192]
    assert [tokens for _, tokens in connector.loaded] == [192 - kept] and kept


def test_what_one_storage_group_has_lost_is_loaded(
    engine: Engine, judge: Judge, connector: StateConnector
) -> None:
    """Though the first one has it, and the connector brings the state at the end."""
    whole = ask(40, before=6, after=140)  # of 260 tokens
    assert run(engine, judge, [whole]) == [0]
    assert engine.llm.reset_prefix_cache()
    beginning = replace(whole, text=" ".join(whole.text.split()[:82]))
    assert run(engine, judge, [beginning]) == [0]
    manager: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    *_, request = connector.known.values()
    group = manager.flow_groups.managers[-1].kv_cache_group_id
    (lost,) = manager.block_pool.get_cached_block(request.block_hashes[2], [group])
    manager.block_pool.evict_blocks({lost.block_id})
    assert run(engine, judge, [whole]) == [256]
    assert [tokens for _, tokens in connector.loaded] == [256]


def test_states_of_requests_that_evict_are_handed_to_nobody(
    engine: Engine, connector: StateConnector
) -> None:
    """Whatever a connector's class says of packed blocks."""
    from vllm import SamplingParams

    orders = {"kv_transfer_params": {"do_remote_decode": True}}
    params = SamplingParams(extra_args={"flow_cliff": 3, **orders})
    with pytest.raises(ValueError, match="flow_cliff=3: .*leave out kv_transfer_params"):
        engine.llm.generate(engine.prompt(ask(30)), params, use_tqdm=False)
    assert not connector.flow_hands_over  # type: ignore[attr-defined]
