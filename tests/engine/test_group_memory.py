"""What storage groups take of a device beside keys and values is taken off the KV cache, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu.block_table import BlockTables

from vllm_flow.engine.groups import FlowAttentionSpec
from vllm_flow.engine.worker import group_memory, worker
from vllm_flow.engine.worker.runner_v2 import FlowRunnerV2

REQUESTS, TOKENS, LENGTH, BLOCK = 12, 96, 1000, 16
CPU = torch.device("cpu")


def specs(groups: int) -> dict[str, FlowAttentionSpec]:
    """Two layers each."""
    return {
        f"layers.{2 * group + layer}": FlowAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32,
            first_layer=2 * group, last_layer=2 * group + 1,
        )
        for group in range(groups)
        for layer in range(2)
    }  # fmt: skip


def runner_with(groups: int, scratch: list[int]) -> Any:
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=parallel),
        max_model_len=LENGTH, max_num_reqs=REQUESTS, max_num_tokens=TOKENS,
        get_kv_cache_spec=lambda: specs(groups), flow_scratch=scratch, flow_variants_scratch=50,
    )  # fmt: skip


def worker_with(groups: int, v2: bool, scratch: list[int], given: int | None = None) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=given),
        model_runner=runner_with(groups, scratch), use_v2_model_runner=v2,
        total_consumed=1000, available_kv_cache_memory_bytes=10**9,
    )  # fmt: skip


def tables_v2(groups: int) -> int:
    """Bytes of what vLLM allocates."""
    width = -(-LENGTH // BLOCK)
    width += -width % (128 // BLOCK)
    made = BlockTables([BLOCK] * groups, REQUESTS, TOKENS, [width] * groups, CPU)
    kept = [table.gpu for table in made.block_tables]
    return sum(tensor.nbytes for tensor in [*kept, *made.input_block_tables, made.slot_mappings])


def tables_v1(groups: int) -> int:
    width = -(-LENGTH // BLOCK)
    made = MultiGroupBlockTable(
        REQUESTS, TOKENS, False, CPU, [BLOCK] * groups, [width] * groups
    ).block_tables
    return sum(table.block_table.gpu.nbytes + table.slot_mapping.gpu.nbytes for table in made)


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize(("v2", "allocated"), [(True, tables_v2), (False, tables_v1)])
def test_what_is_taken_off_is_what_vllm_allocates_for_groups_beyond_one(
    groups: int, v2: bool, allocated: Any
) -> None:
    stock = allocated(1)
    ours = worker_with(groups, v2, [700] * groups)
    left = group_memory.less(ours, 10**9)
    taken = 10**9 - left
    expected = allocated(groups) - stock + 700 * (groups - 1) + 50
    # V1 does not round a table's width up; at most seven blocks per request.
    assert 0 <= taken - expected <= (0 if v2 else 4 * 7 * REQUESTS * (groups - 1))
    assert ours.available_kv_cache_memory_bytes == left
    assert ours.total_consumed == 1000 + taken, "by which vLLM suggests a size for the next start"


def test_what_the_operator_gives_is_given() -> None:
    ours = worker_with(3, True, [7] * 3, given=10**8)
    assert group_memory.less(ours, 10**8) == 10**8
    assert (ours.total_consumed, ours.available_kv_cache_memory_bytes) == (1000, 10**9)


@pytest.mark.parametrize(("on_cpu", "left"), [(True, 9), (False, 4)])
def test_the_worker_asks_on_a_gpu(monkeypatch: pytest.MonkeyPatch, on_cpu: bool, left: int) -> None:
    monkeypatch.setattr(worker.PlatformWorker, "determine_available_memory", lambda self: 9)
    monkeypatch.setattr(group_memory, "less", lambda asking, available: available - 5)
    monkeypatch.setattr(worker, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    assert object.__new__(worker.FlowWorker).determine_available_memory() == left


def test_scratch_of_builders_is_counted() -> None:
    """What is on the host, and what is no tensor, is not."""
    builders = [
        SimpleNamespace(segments=torch.zeros(30, device="meta"), host=torch.zeros(99), heads=4)
        for _ in range(2)
    ]
    groups = [[SimpleNamespace(metadata_builders=builders)], []]
    assert group_memory.scratch_of(groups) == [2 * 120, 0]


def test_buffers_of_profiling_are_gone_before_the_cache_is_allocated() -> None:
    """They hold the tables that a step reads."""
    seen: list[Any] = []

    class Runner:
        attn_groups: tuple[Any, ...] = ()

        def initialize_kv_cache(self, config: Any, is_profiling: bool = False) -> None:
            seen.append(self.model_state.flow_buffers)  # type: ignore[attr-defined]

    both = type("Both", (FlowRunnerV2, Runner), {})()
    graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE)
    both.vllm_config = SimpleNamespace(compilation_config=graphs)
    both.model_state = SimpleNamespace(flow_buffers="those of profiling")
    both.flow_state = SimpleNamespace(use_cache=lambda *args: None, shares_experts=False)
    both.initialize_kv_cache("config")
    assert seen == [None]
