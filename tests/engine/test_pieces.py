"""Rows that leave in steps that vLLM has compiled in pieces: tokens are the oracle's, and no layer runs eagerly."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import (
    BatchDescriptor,
    ForwardContext,
    get_forward_context,
    override_forward_context,
)

from tests.engine.cases import LONG, every_cliff, mixed, one_image
from tests.engine.compiling import counted_calls
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.piecewise import compile_in_pieces, left_as_given, record_pieces
from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
from vllm_flow.engine.worker.passes import pieces
from vllm_flow.engine.worker.passes.compiled_pass import CompiledPass
from vllm_flow.engine.worker.passes.pieces import PASS, Piece, pieces_of


def piece(
    run: Callable[..., Any], index: int = 0, config: object = None, of: object = None
) -> Piece:
    """A piece of a decoder with two layers; its second argument is the number of rows."""
    backend = SimpleNamespace(
        piecewise_compile_index=index,
        total_piecewise_compiles=3,
        vllm_backend=of,
        sym_shape_indices=[1],
        is_encoder_compilation=False,
        compilation_config=config,
    )
    return Piece(run, backend)


def called(found: Piece, *args: Any, graph: BatchDescriptor | None = None) -> Any:
    """Call it as vLLM does, within a forward context."""
    mode = CUDAGraphMode.NONE if graph is None else CUDAGraphMode.PIECEWISE
    context = ForwardContext({}, {}, {}, cudagraph_runtime_mode=mode, batch_descriptor=graph)
    with override_forward_context(context):
        return found(*args)


def test_an_engines_pieces_are_those_of_its_config_and_go_with_it() -> None:
    config, of, drafts = object(), object(), object()
    pieces_here = [piece(print, index, config, of) for index in (2, 0, 1)]
    others = [piece(print, index, drafts, of) for index in range(3)]
    assert pieces_of(config, 3) is None and pieces_of(object(), 2) is None
    found = pieces_of(config, 2)
    assert found is not None and [one.index for one in found] == [0, 1, 2]
    assert not {id(one) for one in found} & {id(one) for one in others}
    draft = [piece(print, index, config, drafts) for index in range(3)]
    assert len(draft) == 3 and pieces_of(config, 2) is None, "two decoders: which is ours?"
    del draft
    assert pieces_of(config, 2) == found
    del found, pieces_here
    assert pieces_of(config, 2) is None


def test_what_counts_rows_is_learnt_from_calls_of_different_size() -> None:
    weight, table, given = torch.zeros(8, 8), torch.zeros(3, 8), list[Any]()

    def run(*args: Any) -> Any:
        given[:] = args
        return args[0], args[3]

    found = piece(run)
    for rows in (8, 8, 3):
        assert found.shapes is None and not found.movable
        called(found, torch.zeros(rows, 4), rows, weight, torch.zeros(3, rows), table)
    assert found.shapes is not None and found.movable
    assert found.shapes.args == {0: 0, 3: 1} and found.shapes.outputs == {0: 0, 1: 1}
    found.for_rows(2, (torch.zeros(2, 4), 3, weight, torch.zeros(3, 2), table))
    assert given[1] == 2


def test_who_reads_what_a_piece_made_last_is_learnt() -> None:
    first = piece(lambda hidden, rows: (hidden + 1, hidden + 2, hidden + 3))
    later = [piece(lambda *args: args[0] + 1, index) for index in (1, 2)]
    for rows in (8, 3):
        read, kept, _unread = called(first, torch.zeros(rows, 4), rows)
        hidden = called(later[0], read, rows)
        called(later[1], hidden, rows, kept)
    assert first.last_readers == {0: 1, 1: 2} and later[0].last_readers == {0: 2}


def test_a_piece_in_which_more_than_rows_changes_is_left_alone() -> None:
    found = piece(lambda *args: args)
    for rows in (8, 3):
        called(found, torch.zeros(rows, 4), rows, torch.zeros(2 * rows))
    assert not found.movable


def test_graphs_are_read_where_vllm_captured_them_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It captures some, throws them away, and captures anew, elsewhere; sizes that it does not have do not count."""
    monkeypatch.setattr(pieces, "weak_ref_tensor", lambda tensor: tensor)
    entries: dict[BatchDescriptor, Any] = {}

    class Wrapper:
        concrete_cudagraph_entries = entries

        def __call__(self, *args: Any) -> Any:
            entries[args[-1]] = SimpleNamespace(cudagraph=object())

    found, captured = piece(Wrapper()), {}
    for attempt in range(2):
        for rows in (4, 16):
            captured[rows] = torch.zeros(rows, 2)
            key = BatchDescriptor(rows)
            called(found, captured[rows], rows, key, graph=key)
            called(found, torch.zeros(rows, 2), rows, key, graph=key)  # a replay tells nothing
        assert [found.fitting(rows) is None for rows in (3, 5, 17)] == [False, False, True]
        for rows, fits in ((1, 4), (4, 4), (5, 16)):
            graph = found.fitting(rows)
            assert graph is not None and graph.inputs[0] is captured[fits]
        if attempt == 0:
            entries.clear()
            entries[BatchDescriptor(4)] = SimpleNamespace(cudagraph=None)  # begun, not made
            assert found.fitting(1) is None


@pytest.mark.parametrize("first_layer", [0, 5])
def test_a_piece_without_a_graph_is_given_no_padding_of_the_graph_before(
    monkeypatch: pytest.MonkeyPatch, first_layer: int
) -> None:
    """Three rows stay of eight. One piece has a graph for four rows, and the next one has none."""
    monkeypatch.setattr(pieces, "weak_ref_tensor", lambda tensor: tensor)
    seen: list[tuple[CUDAGraphMode, int, list[float]]] = []

    class Run:
        def __init__(self) -> None:
            self.concrete_cudagraph_entries: dict[BatchDescriptor, Any] = {}

        def __call__(self, hidden: torch.Tensor, rows: int) -> torch.Tensor:
            mode = get_forward_context().cudagraph_runtime_mode
            seen.append((mode, rows, hidden[:, 0].tolist()))
            return hidden + 1

    runs = [Run() for _ in range(3)]
    found = [piece(run, index) for index, run in enumerate(runs)]
    for one in found:
        for rows in (8, 3):
            called(one, torch.zeros(rows, 1), rows)
    key = BatchDescriptor(4)
    called(found[1], torch.full((4, 1), -9.0), 4, graph=key)
    runs[1].concrete_cudagraph_entries[key] = SimpleNamespace(cudagraph=object())
    seen.clear()

    stay = torch.tensor([0, 2, 5])
    step = DeviceStep({first_layer + 1: DeviceVariant(3, stay, stay)})
    context = ForwardContext({}, {}, {}, cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    setattr(context, PASS, CompiledPass(step, first_layer))
    hidden = torch.arange(8.0)[:, None]
    with override_forward_context(context):
        for one in found:
            hidden = one(hidden, 8)
    assert seen == [
        (CUDAGraphMode.PIECEWISE, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (CUDAGraphMode.PIECEWISE, 4, [1, 3, 6, -9]),
        (CUDAGraphMode.NONE, 3, [2, 4, 7]),
    ]
    assert hidden[:, 0].tolist() == [3, 0, 5, 0, 0, 8, 0, 0]


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
    with left_as_given(
        engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    ):
        outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    used = [set(graph.replayed) for graph in graphs]
    assert not used[0] and len(set.union(*used)) > 1, used
    asks = mixed(LONG.layers)
    assert_exact(engine, asks, engine.run_joining(asks))
