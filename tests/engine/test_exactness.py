"""Tokens and logprobs of the engine are the oracle's, over shapes, cliffs, storage groups, chunks and schedulers."""

from __future__ import annotations

import pytest

from tests.engine import v2_cpu
from tests.engine.cases import (
    EXACT,
    FEW,
    GQA,
    KINDS,
    LONG,
    MISTRAL,
    NEXT,
    QUICK,
    QWEN,
    SHAPES,
    Case,
    mixed,
    one_image,
)
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, assert_exact
from tests.engine.tiny_llava import Shape
from tests.longer import some


@pytest.mark.parametrize(
    "shape",
    v2_cpu.reduced(some(SHAPES, [GQA, MISTRAL, QWEN, NEXT]), to=some([GQA, QWEN], [GQA])),
    ids=lambda shape: f"{shape.family}-{shape.head_dim}-{shape.image_tokens}",
)
def test_stock_baseline_is_the_oracle(open_engine: OpenEngine, shape: Shape) -> None:
    """Before anything else is blamed: vLLM's CPU kernels and Hugging Face agree within the tolerance."""
    engine = open_engine(shape, STOCK)
    asks = [ask.without_policy() for ask in mixed(shape.layers)]
    assert_exact(engine, asks, engine.run(asks))


@pytest.mark.parametrize("case", v2_cpu.reduced(some(EXACT, KINDS), to=some(QUICK, FEW)), ids=str)
def test_batch_is_exact(open_engine: OpenEngine, case: Case) -> None:
    engine = open_engine(case.shape, case.group_layers, **case.options)
    assert_exact(engine, case.asks, engine.run(case.asks))


@pytest.mark.parametrize("cliff", v2_cpu.reduced([0, 1, 3], to=[1]))
def test_alone_is_exact(open_engine: OpenEngine, cliff: int) -> None:
    """A batch of one: from the cliff on, a step's metadata belong to this request only."""
    engine = open_engine(GQA, 2)
    asks = [one_image(31 + cliff, cliff)]
    assert_exact(engine, asks, engine.run(asks))


def test_requests_join_a_running_batch(open_engine: OpenEngine) -> None:
    """Prefills and decodes with different cliffs share steps."""
    engine = open_engine(LONG, 2)
    asks = mixed(LONG.layers)
    assert_exact(engine, asks, engine.run_joining(asks))
