"""FlashInfer on CUDA: in half precision no worse than stock vLLM, with layers before and past a cliff in one group.

``tests/engine/test_flashinfer.py`` runs vLLM's side of it on a CPU, over a stand-in of the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm.utils.flashinfer import has_flashinfer

from tests.engine.cases import every_cliff, mixed
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK
from tests.gpu.backends import DEFAULT, EAGER, WIDE, flash, flashinfer, v1
from tests.gpu.test_cuda_exactness import EXECUTIONS, replays, worst_error

pytestmark = pytest.mark.skipif(not has_flashinfer(), reason="FlashInfer is not installed")


def runner_of(engine: Any) -> Any:
    """vLLM's model runner."""
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_it_errs_no_more_than_stock(open_engine: OpenEngine, execution: dict[str, Any]) -> None:
    """Every cliff in one batch, two layers in a group; then in chunks that end inside an image."""
    asks = every_cliff(WIDE.layers)
    plain = [ask.without_policy() for ask in asks[:: WIDE.layers + 1]]
    stock = open_engine(WIDE, STOCK, **flashinfer())
    yardstick = worst_error(stock, plain, stock.run(plain))
    for chunks in ({}, {"max_num_batched_tokens": 97, "max_num_seqs": 12}):
        engine = open_engine(WIDE, 2, **flashinfer(**execution | chunks))
        assert worst_error(engine, plain, engine.run(plain)) <= 2 * yardstick
        assert worst_error(engine, asks, engine.run_joining(asks)) <= 4 * yardstick


@pytest.mark.skipif(v1(), reason="graphs need Model Runner V2")
def test_decode_steps_replay_where_they_are_not_planned(open_engine: OpenEngine) -> None:
    """By TRT-LLM's kernels or XQA; else graphs of pieces, as the log says."""
    engine = open_engine(WIDE, 2, **flashinfer(**DEFAULT))
    runner = runner_of(engine)
    support, _ = runner.model_state.get_additional_cg_support()
    with replays(engine) as sizes:
        engine.run(mixed(WIDE.layers))
    assert bool(sizes) == (support.name != "NEVER")


@pytest.mark.parametrize("execution", [EAGER, DEFAULT], ids=["eager", "default"])
def test_vllms_own_choice_serves(open_engine: OpenEngine, execution: dict[str, Any]) -> None:
    """Whichever backend it takes on this card, FlashInfer on Blackwell."""
    options = flash(**execution)
    del options["attention_config"]
    asks = every_cliff(WIDE.layers)
    plain = [ask.without_policy() for ask in asks[:: WIDE.layers + 1]]
    stock = open_engine(WIDE, STOCK, **flash())
    yardstick = worst_error(stock, plain, stock.run(plain))
    engine = open_engine(WIDE, 2, **options)
    assert worst_error(engine, asks, engine.run(asks)) <= 4 * yardstick
