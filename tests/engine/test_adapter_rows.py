"""Which rows go through which adapter on a GPU, when rows have left: what vLLM would plan, without waiting for it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from vllm_flow.engine.worker.passes.adapters import AdapterRows

MOST, ROWS = 4, 40


class Wrapper:
    """vLLM's on a GPU, as far as a step's rows go."""

    def __init__(self, rows: list[int]) -> None:
        self._token_lora_indices = torch.full((ROWS,), 99)
        self._token_lora_indices[: len(rows)] = torch.tensor(rows)
        self.indices_len = [len(rows)]
        self.token_mapping_meta = LoRAKernelMeta.make(MOST, ROWS, "cpu", [1, 2, 4])
        self.token_mapping_meta.prepare_tensors(self.token_lora_indices)

    @property
    def token_lora_indices(self) -> torch.Tensor:
        return self._token_lora_indices[: self.indices_len[0]]


def read(meta: LoRAKernelMeta) -> dict[int, list[int]]:
    """Adapter slot -> its rows, as the kernels find them: each slot that is one and has rows."""
    found = {}
    for at, slot in enumerate(meta.active_lora_ids.tolist()):
        start, count = int(meta.lora_token_start_loc[at]), int(meta.num_tokens_per_lora[at])
        if slot >= 0 and count:
            found[slot] = meta.token_indices_sorted_by_lora_ids[start : start + count].tolist()
    return found


def planned(rows: list[int]) -> LoRAKernelMeta:
    meta = LoRAKernelMeta.make(MOST, ROWS, "cpu", [1, 2, 4])
    meta.prepare_tensors(torch.tensor(rows))
    return meta


def decoder_with(wrapper: Any) -> nn.Module:
    module = nn.Linear(1, 1)
    module.punica_wrapper = wrapper
    return module


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, MOST - 1), min_size=1, max_size=ROWS), st.data())
def test_kernels_find_the_rows_that_vllm_would_plan(rows: list[int], data: st.DataObject) -> None:
    """For any adapters, as rows leave twice; and the step's own again in the end."""
    wrapper = Wrapper(rows)
    used = any(slot >= 0 for slot in rows)
    before = {
        name: value.clone()
        for name, value in vars(wrapper.token_mapping_meta).items()
        if isinstance(value, torch.Tensor)
    }
    adapters = AdapterRows(decoder_with(wrapper))
    kept = list(range(len(rows)))
    with mock.patch.object(LoRAKernelMeta, "prepare_tensors", side_effect=AssertionError("waits")):
        for _ in range(2):
            kept = sorted(data.draw(st.sets(st.sampled_from(kept), min_size=1)))
            adapters.keep(torch.tensor(kept))
            if used:
                left = wrapper.token_mapping_meta
                assert wrapper.token_lora_indices.tolist() == [rows[row] for row in kept]
                assert left.token_lora_mapping[: len(kept)].tolist() == [rows[row] for row in kept]
                with mock.patch.object(LoRAKernelMeta, "prepare_tensors", PREPARE):
                    assert read(left) == read(planned([rows[row] for row in kept]))
                assert not left.no_lora_flag_cpu[0]
        adapters.restore()
    assert wrapper.token_lora_indices.tolist() == rows
    after = {name: getattr(wrapper.token_mapping_meta, name) for name in before}
    for name, value in before.items():
        assert after[name].tolist() == value.tolist(), name


PREPARE = LoRAKernelMeta.prepare_tensors


def test_a_step_without_adapters_is_left_alone() -> None:
    wrapper = Wrapper([-1, -1, -1])
    AdapterRows(decoder_with(wrapper)).keep(torch.tensor([0, 2]))
    assert wrapper.indices_len == [3]
    assert wrapper.token_mapping_meta.no_lora_flag_cpu[0]
