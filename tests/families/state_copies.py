"""Copies of states between blocks where drafts meet the prefix cache, on a CPU: vLLM has a Triton kernel for each of
the two, and nothing in their place.

Which states are copied is said by what the kernels are launched with; a copy moves bytes, as theirs do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext as Context


def install() -> None:
    """Use them from now on, in this process."""
    Context.run_fused_precopy = _before
    Context.run_fused_postprocess = _after


def _before(
    self: Any,
    num_reqs: int,
    state_idx_gpu: torch.Tensor,
    src_col_gpu: torch.Tensor,
    token_bias_gpu: torch.Tensor,
    idx_mapping: torch.Tensor | None,
) -> None:
    """Before a step that goes on in another block: the state of the last draft that was accepted goes there."""
    assert idx_mapping is None, "Model Runner V2 has kernels that an interpreter runs"
    for request in range(num_reqs):
        source, target = int(src_col_gpu[request]), int(state_idx_gpu[request])
        if source not in (-1, target):
            _copy(self, request, source, target, int(token_bias_gpu[request]))


def _after(
    self: Any,
    num_reqs: int,
    num_accepted_tokens_gpu: torch.Tensor,
    mamba_state_idx_gpu: torch.Tensor,
    num_scheduled_tokens_gpu: torch.Tensor,
    num_computed_tokens_gpu: torch.Tensor,
    num_draft_tokens_gpu: torch.Tensor,
) -> None:
    """After a step that filled a block: the state at the block's end goes into the block."""
    self.num_accepted_tokens_out[:num_reqs].copy_(num_accepted_tokens_gpu[:num_reqs])
    known = num_computed_tokens_gpu + num_scheduled_tokens_gpu - num_draft_tokens_gpu
    for request in range(num_reqs):
        running, source = int(known[request]), int(mamba_state_idx_gpu[request])
        computed = running + int(num_accepted_tokens_gpu[request]) - 1
        whole = computed // self.block_size
        accepted = whole * self.block_size - running
        if accepted < 0:
            continue
        target = whole - 1
        if source == target:
            self.num_accepted_tokens_out[request] = 1
        if source != target or accepted:
            _copy(self, request, source, target, accepted)


def _copy(context: Any, request: int, source: int, target: int, accepted: int) -> None:
    """Every state of a request from one column of its block tables to another.

    Args:
        accepted: drafts before the state that is meant: of convolutions, whose inputs lie one behind the other, so
            many go; of other states one lies so many blocks further.
    """
    row = request * context.block_table_stride_req

    def address(state: int, column: int) -> int:
        table = int(context.block_table_ptrs[context.state_group_indices[state]])
        block = ctypes.c_int32.from_address(table + 4 * (row + column)).value
        assert block, "the null block holds no state"
        return int(context.state_base_addrs[state]) + block * int(
            context.state_block_strides[state]
        )

    for state in range(context.num_states):
        size, width = int(context.state_elem_sizes[state]), int(context.state_conv_widths[state])
        inner = int(context.state_inner_sizes[state]) * size
        if not width:
            ctypes.memmove(address(state, target), address(state, source + accepted), inner)
            continue
        rows = int(context.state_dim_row_count[state]) or 1
        stride = int(context.state_dim_row_stride[state])
        for at in range(rows):
            there, here = (address(state, column) + at * stride for column in (target, source))
            ctypes.memmove(there, here + accepted * inner, (width - accepted) * inner)
