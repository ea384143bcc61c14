"""Rows that leave in steps that vLLM has compiled in pieces: tokens are the oracle's, and no layer runs eagerly."""

from __future__ import annotations

import pytest

from tests.engine.cases import LONG, every_cliff, mixed, one_image
from tests.engine.compiling import counted_calls
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.piecewise import compile_in_pieces, record_pieces


@pytest.mark.long
def test_rows_leave_in_compiled_pieces(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_in_pieces(monkeypatch)
    engine = open_engine(LONG, 2, enforce_eager=False)
    plain = [one_image(30)]  # a prefill and decodes: calls of different size
    assert_exact(engine, plain, engine.run(plain))
    asks = every_cliff(LONG.layers)[1:-1]
    with counted_calls(engine) as calls:
        assert_exact(engine, asks, engine.run(asks))
    assert calls.eager == 0


def test_what_is_left_of_a_step_is_replayed(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that fit into a graph go through graphs, from where they do; several cliffs need several sizes."""
    compile_in_pieces(monkeypatch)
    engine = open_engine(LONG, 2, enforce_eager=False, max_num_batched_tokens=1000)
    plain = [one_image(30)]
    assert_exact(engine, plain, engine.run(plain))
    graphs = record_pieces(engine, [16, 64, 256, 512])
    asks = every_cliff(LONG.layers)[1:-1]
    assert_exact(engine, asks, engine.run(asks))
    used = [set(graph.replayed) for graph in graphs]
    assert not used[0] and len(set.union(*used)) > 1, used
    asks = mixed(LONG.layers)
    assert_exact(engine, asks, engine.run_joining(asks))
