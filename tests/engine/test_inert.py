"""Requests without a policy get stock vLLM's tokens, whatever the storage groups."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import v2_cpu
from tests.engine.cases import LONG, mixed
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, assert_same
from tests.longer import some

OPTIONS: dict[str, dict[str, Any]] = {
    "whole prefills": {},
    "chunks": {"max_num_batched_tokens": 97, "max_num_seqs": 12},
    "prefix caching": {"enable_prefix_caching": True},
}


@pytest.mark.parametrize(
    "name", v2_cpu.reduced(OPTIONS, to=some(["chunks", "prefix caching"], ["chunks"]))
)
@pytest.mark.parametrize("group_layers", v2_cpu.reduced(some([2, 6], [2]), to=[2]))
def test_without_policy_equals_stock(open_engine: OpenEngine, group_layers: int, name: str) -> None:
    options = OPTIONS[name]
    asks = [ask.without_policy() for ask in mixed(LONG.layers)]
    asks = v2_cpu.reduced(asks, to=asks[:7])
    stock = open_engine(LONG, STOCK, **options).run(asks)
    assert_same(open_engine(LONG, group_layers, **options).run(asks), stock)


def test_without_policy_equals_stock_after_policies(open_engine: OpenEngine) -> None:
    """Nothing of a policy stays behind in blocks, batch slots or the decoder."""
    asks = [ask.without_policy() for ask in mixed(LONG.layers)]
    engine = open_engine(LONG, 2)
    engine.run(mixed(LONG.layers))
    assert_same(engine.run(asks), open_engine(LONG, STOCK).run(asks))
