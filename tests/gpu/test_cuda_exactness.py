"""On CUDA: tokens are the oracle's, with and without graphs, and in half precision no worse than stock's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
from vllm import RequestOutput

from tests.engine import oracle
from tests.engine.cases import GQA, LONG, QUICK, Ask, Case, Shape, every_cliff, mixed, text_around
from tests.engine.compiling import counted_calls
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, Engine, assert_exact, logprobs_of, picture, tokens_of
from tests.engine.policy_cases import device_mixed, late_mixed, row_mixed
from tests.gpu.backends import DEFAULT, EAGER, GRAPHS, WIDE, flash, triton, v1
from vllm_flow.engine.worker.passes.pieces import Piece

EXECUTIONS = [
    pytest.param(EAGER, id="eager"),
    pytest.param(
        GRAPHS,
        id="graphs",
        marks=pytest.mark.skipif(v1(), reason="graphs need Model Runner V2"),
    ),
    pytest.param(DEFAULT, id="default"),
]


@contextmanager
def replays(engine: Engine) -> Iterator[list[int]]:
    """Sizes of the CUDA graphs replayed meanwhile."""
    sizes: list[int] = []
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is None:
        yield sizes
        return
    original = manager.run_fullgraph

    def run(descriptor: Any) -> Any:
        sizes.append(descriptor.num_tokens)
        return original(descriptor)

    with mock.patch.object(manager, "run_fullgraph", run):
        yield sizes


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_triton_attention_is_exact(
    open_engine: OpenEngine, case: Case, execution: dict[str, Any]
) -> None:
    engine = open_engine(case.shape, case.group_layers, **triton(**execution | case.options))
    with replays(engine) as sizes:
        outputs = engine.run(case.asks)
    assert_exact(engine, case.asks, outputs)
    assert bool(sizes) == (bool(execution) and not v1())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_requests_join_a_running_batch(open_engine: OpenEngine, execution: dict[str, Any]) -> None:
    engine = open_engine(LONG, 2, **triton(**execution))
    asks = mixed(LONG.layers)
    with replays(engine) as sizes:
        outputs = engine.run_joining(asks)
    assert_exact(engine, asks, outputs)
    assert bool(sizes) == (bool(execution) and not v1())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_leaves_after_the_prefill_is_exact(
    open_engine: OpenEngine, execution: dict[str, Any]
) -> None:
    engine = open_engine(LONG, 2, **triton(**execution), enable_prefix_caching=True)
    asks = late_mixed(LONG.layers)
    for run in (engine.run_joining, engine.run):
        assert assert_exact(engine, asks, run(asks), ties=True) >= len(asks) * 0.8


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_the_device_keeps_is_exact(open_engine: OpenEngine, execution: dict[str, Any]) -> None:
    """Every rank: by embeddings, inside the tower, by attention of one row and of many, by hidden states."""
    engine = open_engine(LONG, 2, **triton(**execution))
    for asks in (device_mixed(LONG.layers), row_mixed()):
        compared = assert_exact(engine, asks, engine.run(asks), ties=True)
        assert compared >= len(asks) * 0.8


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_text_around_images_is_exact(open_engine: OpenEngine, execution: dict[str, Any]) -> None:
    """In the last layer with image rows their keys alone are computed, and the text is given in runs."""
    engine = open_engine(LONG, 1, **triton(**execution), max_num_batched_tokens=97, max_num_seqs=4)
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert runner.flow_state.planner.spares_last_layers
    asks = [text_around(40, cliff) for cliff in range(1, LONG.layers)]
    assert_exact(engine, asks, engine.run(asks))


@pytest.mark.parametrize("execution", EXECUTIONS[-1:])
def test_rows_leave_in_compiled_pieces(
    open_engine: OpenEngine, execution: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started as vLLM does without a flag, no layer's own code runs, and what is left of a step is replayed."""
    engine = open_engine(LONG, 2, **triton(**execution))
    sizes: list[int] = []
    fitting = Piece.fitting

    def noted(piece: Piece, num_rows: int) -> Any:
        graph = fitting(piece, num_rows)
        sizes.append(0 if graph is None else graph.descriptor.num_tokens)
        return graph

    monkeypatch.setattr(Piece, "fitting", noted)
    asks = every_cliff(LONG.layers)[1:-1]
    with counted_calls(engine) as calls:
        assert_exact(engine, asks, engine.run(asks))
        assert_exact(engine, asks[:3], engine.run_joining(asks[:3]))
    assert calls.eager == 0 and calls.model
    assert 0 in sizes and max(sizes) > 0, "too many rows for a graph, and few enough"


def worst_error(engine: Engine, asks: Sequence[Ask], outputs: Sequence[RequestOutput]) -> float:
    """Largest difference to the oracle's logprobs over the tokens up to the first that differs."""
    worst = 0.0
    for ask, output in zip(asks, outputs, strict=True):
        pictures = [picture(engine.shape, seed) for seed in ask.images]
        expected = oracle.check_greedy(
            engine.model_dir, ask.prompt, pictures, ask.cliff, tokens_of(output), ask.allowed
        )
        same = 0
        for found, right in zip(tokens_of(output), expected.token_ids, strict=False):
            if found != right:
                break
            same += 1
        pairs = zip(logprobs_of(output)[:same], expected.logprobs, strict=False)
        worst = max(worst, max((abs(a - b) for a, b in pairs), default=float("inf")))
    return worst


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("shape", [WIDE], ids=lambda shape: f"head-{shape.head_dim}")
def test_flash_attention_errs_no_more_than_stock(
    open_engine: OpenEngine, shape: Shape, execution: dict[str, Any]
) -> None:
    """Half precision has an error of its own; stock vLLM's on the same prompts is the yardstick."""
    asks = every_cliff(shape.layers)
    plain = [ask.without_policy() for ask in asks[:: shape.layers + 1]]
    stock = open_engine(shape, STOCK, **flash())
    yardstick = worst_error(stock, plain, stock.run(plain))
    engine = open_engine(shape, 2, **flash(**execution))
    assert worst_error(engine, plain, engine.run(plain)) <= 2 * yardstick
    assert worst_error(engine, asks, engine.run(asks)) <= 4 * yardstick


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_decode_steps_wait_for_nothing(open_engine: OpenEngine, execution: dict[str, Any]) -> None:
    """What eviction adds to a step never makes the host wait for the device."""
    import torch

    engine = open_engine(GQA, 2, **triton(**execution))
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    guarding = [(runner.flow_state, "plan")]
    if hasattr(runner, "model_state"):  # model runner V2
        guarding.append((runner.model_state, "_prepare_graph"))
    asks = every_cliff(GQA.layers)
    calls: list[str] = []

    def guarded(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return original(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                calls.append(name)

        return call

    with ExitStack() as stack:
        for owner, name in guarding:
            stack.enter_context(mock.patch.object(owner, name, guarded(owner, name)))
        outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    assert ("_prepare_graph" in calls) == (bool(execution) and not v1())
    assert "plan" in calls
