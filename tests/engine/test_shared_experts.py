"""Engines that compute experts for one another are told how many rows each layer of each has.

In two engines that do: tests/families/test_sharing_experts.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import DPMetadata, ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_flow.engine import adoption
from vllm_flow.engine.families import Decoder
from vllm_flow.engine.layout_book import LayoutBook
from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
from vllm_flow.engine.worker.passes import shared_experts
from vllm_flow.engine.worker.passes.decoder import DecoderHook
from vllm_flow.engine.worker.passes.shared_experts import LayerRows, SharedExperts, rows_by_layer
from vllm_flow.engine.worker.runner_v1 import FlowRunnerV1
from vllm_flow.engine.worker.runner_v2 import FlowGraphManager
from vllm_flow.engine.worker.worker_state import WorkerState
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

DENSE = 0
"""A layer without experts, before those that have some."""
NUM_LAYERS = 4


@given(
    st.dictionaries(st.integers(0, 9), st.integers(0, 50)),
    st.integers(1, 50),
    st.sets(st.integers(0, 9)),
)
def test_each_layer_has_the_rows_that_are_left_by_then(
    left: dict[int, int], step_rows: int, experts: set[int]
) -> None:
    expected, rows = {}, step_rows
    for layer in range(10):
        rows = left.get(layer, rows)
        expected[layer] = rows or 1
    found = rows_by_layer(left, step_rows, sorted(experts))
    assert found == [expected[layer] for layer in sorted(experts)]


def test_layers_are_told_in_the_order_in_which_they_ask() -> None:
    told = LayerRows(torch.tensor([[8, 3, 1], [2, 2, 2]], dtype=torch.int32))
    assert told.num_tokens_across_dp_cpu.tolist() == [8, 2], "before anybody asks"
    for expected in ([8, 2], [3, 2], [1, 2]):
        with told.sp_local_sizes(1) as sizes:
            assert sizes == told.get_chunk_sizes_across_dp_rank() == expected
            assert told.cu_tokens_across_sp(1).tolist() == [expected[0], sum(expected)]
    with pytest.raises(RuntimeError), told.sp_local_sizes(1):
        pass  # nobody counted such a layer


def _experts() -> nn.Module:
    """A module that counts as a layer of experts, without what one is made of."""
    layer = MoERunner.__new__(MoERunner)
    nn.Module.__init__(layer)
    return layer


def _layers() -> list[nn.Module]:
    return [nn.Identity() if n == DENSE else nn.Sequential(_experts()) for n in range(NUM_LAYERS)]


def _step(rows: dict[int, int], step_rows: int) -> DeviceStep:
    variants = {}
    for first, count in rows.items():
        every = None if count == step_rows else torch.arange(count)
        variants[first] = DeviceVariant(count, every, every)
    return DeviceStep(variants=variants)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.MagicMock]:
    """The second of three engines: what the first and the third say is put in by ``side_effect``."""
    group = SimpleNamespace(world_size=3, rank_in_group=1, cpu_group=object())
    monkeypatch.setattr(shared_experts, "get_dp_group", lambda: group)
    with mock.patch.object(shared_experts.dist, "all_reduce") as reduce:
        yield reduce


def _context(mode: CUDAGraphMode = CUDAGraphMode.NONE) -> ForwardContext:
    told = DPMetadata(torch.tensor([7, 10, 1], dtype=torch.int32))
    return ForwardContext({}, {}, {}, dp_metadata=told, cudagraph_runtime_mode=mode)


def _say(others: mock.MagicMock, first: list[int], third: list[int]) -> None:
    def reduce(rows_EX: torch.Tensor, group: Any) -> None:
        assert not rows_EX[[0, 2]].any(), "this engine speaks for itself alone"
        rows_EX[0], rows_EX[2] = torch.tensor(first), torch.tensor(third)

    others.side_effect = reduce


def test_rows_that_leave_here_are_told(others: mock.MagicMock) -> None:
    _say(others, [7, 7, 7], [1, 1, 1])
    with override_forward_context(context := _context()):
        SharedExperts(_layers()).agree(_step({1: 10, 2: 4, 3: 0}, 10))
    told: Any = context.dp_metadata
    found = []
    for _ in range(3):
        with told.sp_local_sizes(1) as sizes:
            found.append(sizes)
    assert found == [[7, 10, 1], [7, 4, 1], [7, 1, 1]]


def test_rows_that_leave_elsewhere_are_told_without_a_step_of_ours(others: mock.MagicMock) -> None:
    _say(others, [7, 2, 2], [1, 1, 1])
    with override_forward_context(context := _context()):
        SharedExperts(_layers()).agree(None)
    told: Any = context.dp_metadata
    with told.sp_local_sizes(1) as sizes:
        assert sizes == [7, 10, 1]
    with told.sp_local_sizes(1) as sizes:
        assert sizes == [2, 10, 1]


def test_where_no_row_leaves_vllm_has_its_own_numbers(others: mock.MagicMock) -> None:
    _say(others, [7, 7, 7], [1, 1, 1])
    with override_forward_context(context := _context()):
        was = context.dp_metadata
        SharedExperts(_layers()).agree(_step({2: 10}, 10))
    assert context.dp_metadata is was and others.call_count == 1


def test_rows_of_padding_are_the_steps_own(others: mock.MagicMock) -> None:
    """A variant that keeps every row has the step's, whose number is vLLM's, padding included."""
    _say(others, [7, 7], [1, 1])
    step = DeviceStep(variants={1: DeviceVariant(8, None, None)})
    with override_forward_context(context := _context()):
        was = context.dp_metadata
        SharedExperts(_layers()[:3]).agree(step)
    assert context.dp_metadata is was and others.call_count == 1


@pytest.mark.parametrize("lacks", ["numbers", "experts", "others"])
def test_who_has_nobody_to_wait_for_asks_nobody(
    others: mock.MagicMock, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.setattr(shared_experts, "should_skip_dp_coordination", lambda: lacks == "others")
    with override_forward_context(context := _context()):
        if lacks == "numbers":
            context.dp_metadata = None
        was = context.dp_metadata
        SharedExperts(_layers()[: 1 if lacks == "experts" else 3]).agree(_step({1: 4}, 10))
    assert context.dp_metadata is was and not others.called


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL])
def test_graphs_take_what_they_were_captured_with(
    others: mock.MagicMock, mode: CUDAGraphMode
) -> None:
    with override_forward_context(context := _context(mode)):
        was = context.dp_metadata
        SharedExperts(_layers()).agree(None)
    assert context.dp_metadata is was and not others.called


def test_a_layer_without_rows_keeps_up() -> None:
    """On one row of zeros, of which attention knows nothing; and what it makes of it goes nowhere."""
    seen: list[tuple[Any, ...]] = []

    class Layer(nn.Module):
        def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
            seen.append((hidden_states.clone(), context.attn_metadata, context.slot_mapping))
            return hidden_states + 1, hidden_states

    layers = [Layer() for _ in range(3)]
    context, experts = _context(), SharedExperts(layers)
    context.attn_metadata = context.slot_mapping = {"layer": "told"}
    decoder = Decoder(nn.Identity(), layers, nn.Identity(), call="residual")
    nobody, alone = torch.arange(0), DecoderHook(decoder)
    step = DeviceStep(variants={1: DeviceVariant(0, nobody, nobody)})
    positions, hidden = torch.arange(2), torch.ones(2, 3)
    for hook, calls in (alone, 1), (DecoderHook(decoder, shared_experts=experts), 3):
        seen.clear()
        with override_forward_context(context), hook.installed(step):
            found: Any = (hidden, None)
            for layer in layers:
                found = layer(positions, *found)
            assert found[0].shape == (0, 3)
        assert len(seen) == calls
    assert torch.equal(seen[0][0], hidden) and seen[0][1] == {"layer": "told"}
    for row, metadata, slots in seen[1:]:
        assert torch.equal(row, torch.zeros(1, 3)) and metadata is None and slots == {}
    assert context.attn_metadata == context.slot_mapping == {"layer": "told"}


def _output(new: dict[str, int], cached: dict[str, int]) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=computed)
            for name, computed in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=list(cached.values())
        ),
    )


@pytest.mark.parametrize(
    ("new", "cached", "without"),
    [
        ({"evicts": 0}, {}, True),
        ({}, {"evicts": 11}, True),
        ({}, {"evicts": 12}, False),  # its picture is tokens 4 to 11
        ({"keeps": 0}, {"evicts": 30}, False),
        ({"keeps": 0}, {"evicts": 4, "other": 7}, True),
    ],
)
def test_a_step_that_loses_rows_is_no_graph(
    new: dict[str, int], cached: dict[str, int], without: bool
) -> None:
    state = WorkerState.__new__(WorkerState)
    state.book = LayoutBook(NUM_LAYERS)
    layout = TokenLayout.of(FlowPolicy.withdrawal(2), ImageSpans(((4, 12),)), 20)
    assert layout is not None
    state.book.layouts["evicts"] = layout
    for shared in False, True:
        state.shares_experts = shared
        assert state.without_graph(_output(new, cached)) == (shared and without)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_runner_v1_asks_for_a_step_without(ours: bool, forced: bool) -> None:
    class Stock:
        def _determine_batch_execution_and_padding(self, tokens: int, force_eager: bool) -> bool:
            return force_eager

    class Runner(FlowRunnerV1, Stock):
        flow_without_graph = ours

    runner = Runner.__new__(Runner)
    found = runner._determine_batch_execution_and_padding(7, force_eager=forced)
    assert found == (ours or forced)


def test_runner_v2_asks_for_a_step_without() -> None:
    manager = CudaGraphManager.__new__(CudaGraphManager)
    graph = BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 8, None)
    manager._graphs_captured, manager._candidates = True, {(5, 0): [graph]}
    manager._resolve_effective_loras = lambda active: active
    runner: Any = SimpleNamespace(flow_without_graph=False)
    stock = manager.dispatch(2, 5, None, num_active_loras=0)
    adoption.adopt(manager, FlowGraphManager, flow_runner=runner)
    assert manager.dispatch(2, 5, None, num_active_loras=0) == stock == graph
    runner.flow_without_graph = True
    found = manager.dispatch(2, 5, None, num_active_loras=0)
    assert found == BatchExecutionDescriptor(CUDAGraphMode.NONE, 5, 2)
