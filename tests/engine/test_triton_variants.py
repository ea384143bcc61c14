"""Kernels are compiled before an engine serves: what a step then launches is no new variant of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.span_cases import BATCHES, GROUPS, Heads, make
from tests.engine.triton_variants import Launches, with_triton
from vllm_flow.engine.worker import worker

pytest.importorskip("triton")

LAYERS, MOST = 4, 300


@pytest.mark.parametrize("most", [1, 24, MOST])
def test_captured_steps_of_any_size_refresh_by_one_kernel(most: int) -> None:
    """The one that was launched when the buffers were made, before anything is captured."""
    module = with_triton("vllm_flow.engine.worker.decode_graphs")
    launches = Launches(module, "_refresh_kernel")
    spec = SimpleNamespace(block_size=16)
    names = [f"model.layers.{layer}.attn" for layer in range(LAYERS)]
    config = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=names, kv_cache_spec=spec)]
    )
    tables = [torch.zeros(most, 8, dtype=torch.int32)]
    buffers = module.DecodeBuffers(tables, config, LAYERS, most, 3)
    assert launches.count == 1 and len(launches.variants) == 1
    lengths = torch.zeros(most, dtype=torch.int32)
    for padded in {1, 2, 5, 16, 17, most} & set(range(1, most + 1)):
        for rows in (1, 2, 3):
            for stages in (None, 1, 2):
                facts = None if stages is None else np.zeros((stages, 2, padded), np.int32)
                buffers.refresh(lengths[:padded], facts, padded, rows)
    assert launches.count > 9 and len(launches.variants) == 1


def test_pictures_of_any_size_are_put_in_order_by_variants_of_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = with_triton("vllm_flow.engine.worker.choosing.farthest_first")
    monkeypatch.setattr(module, "HAS_TRITON", True)
    launches = Launches(module, "_farthest_first")
    module.compile_all(torch.device("cpu"))
    assert not launches.count, "nothing where a GPU is not"
    monkeypatch.setattr(module, "fast_order", lambda rank, device: module.farthest_first_triton)
    module.compile_all(torch.device("cpu"))
    before = set(launches.variants)
    assert len(before) == launches.count == len(module.BLOCKS)
    for tokens in (1, 2, 16, 576, 577, 1024, 1025, 1500, module.AT_ONCE):
        for keep in {1, 16, tokens}:
            module.farthest_first_triton(torch.ones(tokens, 3), min(keep, tokens))
    assert launches.variants == before


@pytest.mark.parametrize("heads", [*GROUPS[:2], GROUPS[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_kind_are_logged_by_the_variant_of_the_start(
    heads: Heads, dtype: torch.dtype
) -> None:
    module = with_triton("vllm_flow.engine.worker.attention.span_lse_triton")
    launches = Launches(module, "_span_lse")
    cases = [make(heads, rows, 0, dtype, "cpu") for rows in BATCHES.values()]
    _, cache, read, *_, scale = cases[0]
    attention = SimpleNamespace(
        num_heads=heads.query, head_size=heads.size, dtype=dtype, kv_cache=cache,
        impl=SimpleNamespace(scale=scale),
    )  # fmt: skip
    module.compile_for(attention, read)
    before = set(launches.variants)
    assert len(before) == 1
    for query, _, _, blocks, bounds, _ in cases:
        for count in range(1, len(query) + 1):
            # As the log sends them, bounds lie behind three integers of each row.
            packed = torch.cat([torch.zeros(3 * count, dtype=torch.int64), bounds[:count].ravel()])
            own = packed[3 * count :].view(count, -1)
            for rows in (own, own[:, :2]):
                args = query[:count].clone(), cache, read, blocks[:count].contiguous(), rows, scale
                module.span_lse_triton(*args)
    assert launches.variants == before


@pytest.mark.parametrize("warms_up", [True, False])
def test_the_worker_compiles_before_vllm_warms_up(
    monkeypatch: pytest.MonkeyPatch, warms_up: bool
) -> None:
    """Where vLLM is told to warm up: else it expects to compile while it serves."""
    done: list[str] = []

    def platforms(self: Any) -> str:
        done.append("vLLM's")
        return "times"

    monkeypatch.setattr(worker.PlatformWorker, "compile_or_warm_up_model", platforms)
    monkeypatch.setattr(worker.farthest_first, "compile_all", done.append)
    flow = object.__new__(worker.FlowWorker)
    flow.model_runner = SimpleNamespace(device="ours")
    flow.vllm_config = SimpleNamespace(kernel_config=SimpleNamespace(enable_jit_warmup=warms_up))
    assert flow.compile_or_warm_up_model() == "times"
    assert done == (["ours", "vLLM's"] if warms_up else ["vLLM's"])
