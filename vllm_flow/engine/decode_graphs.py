"""Attention metadata of captured decode steps: a row per decoder layer, in memory that never moves.

A CUDA graph replays kernels over the addresses it was captured with, and no Python runs in between. So
every layer is captured with metadata of its own, which points into the tensors here; before each
replay one kernel writes into them what each layer sees of each request.

Seams: ``CommonAttentionMetadata`` and the backends' metadata builders. Only backends whose metadata is
nothing but such pointers can be captured like this (:data:`REPLAYABLE`).

Legend: L decoder layers, R requests of the step, padded to a captured size; one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.model_executor.models.utils import extract_layer_index
from vllm.triton_utils import tl, triton
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_flow.engine.device_step import FlowStep

REPLAYABLE = ("FLASH_ATTN", "TRITON_ATTN")
"""Backends whose kernels read lengths, tables and slots from the device, and nothing planned on the host.

FlashAttention 3 plans its work inside the kernel where no schedule is handed to it (``fast_build``).
"""


def unreplayable(attn_groups: Sequence[Sequence[Any]]) -> str | None:
    """Which of the attention backends cannot be captured like this, and why; None if all can."""
    for attn_group in (found for of_group in attn_groups for found in of_group):
        backend = attn_group.backend.get_name()
        if backend not in REPLAYABLE:
            return f"{backend} (with vLLM-Flow, {' and '.join(REPLAYABLE)} have full graphs)"
        if attn_group.kernel_block_size is not None:
            size = attn_group.kv_cache_spec.block_size
            return (
                f"{backend} dividing KV blocks of {size} tokens (with vLLM-Flow, full graphs need "
                f"--block-size {attn_group.kernel_block_size})"
            )
    return None


class DecodeBuffers:
    """Lengths and slots of every layer, and the kernel that brings them up to date.

    Args:
        block_tables: per KV-cache group, vLLM's persistent table, [>= R, blocks] int32. Kept: the
            captured kernels read the same memory.
        kv_cache_config: names the layers and the block size of each group.
        num_layers: decoder layers.
        max_reqs: most requests of a step.
    """

    def __init__(
        self,
        block_tables: Sequence[torch.Tensor],
        kv_cache_config: KVCacheConfig,
        num_layers: int,
        max_reqs: int,
    ) -> None:
        groups = kv_cache_config.kv_cache_groups
        device = block_tables[0].device
        group_of_layer = [0] * num_layers
        for group, spec in enumerate(groups):
            for name in spec.layer_names:
                group_of_layer[extract_layer_index(name)] = group

        def integers(values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.seq_lens_LR = torch.zeros(num_layers, max_reqs, dtype=torch.int32, device=device)
        self.slots_LR = torch.full(
            (num_layers, max_reqs), PAD_SLOT_ID, dtype=torch.int64, device=device
        )
        # A stage or more per request, at most one per layer.
        self._facts = torch.full(
            (2 * num_layers * max_reqs,), num_layers, dtype=torch.int32, device=device
        )
        self._tables = list(block_tables)
        self._table_pointers = integers([t.data_ptr() for t in self._tables], torch.uint64)
        self._table_strides = integers([t.stride(0) for t in self._tables], torch.int64)
        self._block_sizes = integers([spec.kv_cache_spec.block_size for spec in groups])
        self._group_of_layer = integers(group_of_layer)

    @property
    def num_layers(self) -> int:
        return len(self.seq_lens_LR)

    def stand_on(self, block_tables: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tables the buffers were made for; profiling uses others."""
        return [t.data_ptr() for t in block_tables] == [t.data_ptr() for t in self._tables]

    def blank(self, seq_lens_R: torch.Tensor) -> None:
        """A step of requests that nobody sent: lengths as given in every layer, no slot written."""
        self.seq_lens_LR[:, : len(seq_lens_R)] = seq_lens_R
        self.slots_LR.fill_(PAD_SLOT_ID)

    def refresh(
        self, seq_lens_R: torch.Tensor, facts_S2Q: NDArray[np.int32] | None, num_reqs: int
    ) -> None:
        """Bring every layer's lengths and slots up to date; waits for nothing.

        Args:
            seq_lens_R: tokens of each request after the step, padding included, on the device.
            facts_S2Q: :func:`vllm_flow.decode_plan.decode_facts` of the Q = ``num_reqs`` requests
                before the padding; None where none of them evicts.
        """
        num_stages = 0
        if facts_S2Q is not None:
            num_stages = len(facts_S2Q)
            host = torch.from_numpy(facts_S2Q)
            if self._facts.is_cuda:
                host = host.pin_memory()
            self._facts[: host.numel()].copy_(host.view(-1), non_blocking=True)
        block = triton.next_power_of_2(len(seq_lens_R))
        _refresh_kernel[(self.num_layers,)](
            seq_lens_R,
            self._facts,
            self._group_of_layer,
            self._table_pointers,
            self._table_strides,
            self._block_sizes,
            self.seq_lens_LR,
            self.slots_LR,
            self.seq_lens_LR.stride(0),
            num_stages,
            num_reqs,
            len(seq_lens_R),
            PAD=PAD_SLOT_ID,
            BLOCK=block,
        )

    def capture(
        self,
        input_batch: Any,
        block_tables: Sequence[torch.Tensor],
        attn_groups: Sequence[Sequence[Any]],
        max_seq_len: int,
    ) -> FlowStep:
        """What a decode step is captured with: each layer's metadata and slots.

        Args:
            input_batch: vLLM's dummy batch of R requests with one token each.
            max_seq_len: longest request that a replay may see.
        """
        num_reqs = input_batch.num_reqs
        self.blank(input_batch.seq_lens[:num_reqs])
        step = FlowStep(variants={})
        for group, table in enumerate(block_tables):
            for attn_group in attn_groups[group]:
                for name in attn_group.layer_names:
                    layer = extract_layer_index(name)
                    slots = self.slots_LR[layer, :num_reqs]
                    common = CommonAttentionMetadata(
                        query_start_loc=input_batch.query_start_loc[: num_reqs + 1],
                        query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32),
                        seq_lens=self.seq_lens_LR[layer, :num_reqs],
                        seq_lens_cpu_upper_bound=torch.full(
                            (num_reqs,), max_seq_len, dtype=torch.int32
                        ),
                        num_reqs=num_reqs,
                        num_actual_tokens=num_reqs,
                        max_query_len=1,
                        max_seq_len=max_seq_len,
                        block_table_tensor=table[:num_reqs],
                        slot_mapping=slots,
                    )
                    # Without the schedule that a builder would write into memory of its own, which
                    # all layers of its group would share.
                    step.attn_metadata[name] = attn_group.get_metadata_builder(0).build(
                        0, common, fast_build=True
                    )
                    step.slot_mapping[name] = slots
        return step


@triton.jit(do_not_specialize=["num_stages", "num_reqs", "num_padded"])
def _refresh_kernel(
    seq_lens,  # [R]
    facts,  # [num_stages, 2, num_reqs]: first layer, tokens missing from it on
    group_of_layer,  # [L]
    table_pointers,  # [groups]
    table_strides,  # [groups]
    block_sizes,  # [groups]
    layer_seq_lens,  # [L, max R]
    layer_slots,  # [L, max R]
    layer_stride,
    num_stages,
    num_reqs,
    num_padded,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    group = tl.load(group_of_layer + layer)
    block_size = tl.load(block_sizes + group)
    table = tl.load(table_pointers + group).to(tl.pointer_type(tl.int32))
    request = tl.arange(0, BLOCK)
    real = request < num_reqs
    seq_len = tl.load(seq_lens + request, mask=real, other=0)
    missing = tl.zeros([BLOCK], dtype=tl.int32)
    # Of the deepest stage that the layer has reached; each has lost what those before it have.
    for stage in range(num_stages):
        fact = facts + stage * 2 * num_reqs + request
        first = tl.load(fact, mask=real, other=0)
        gone = tl.load(fact + num_reqs, mask=real, other=0)
        missing = tl.where(layer >= first, gone, missing)
    # Padding has length 0 as vLLM's own has: kernels skip it.
    stored = tl.maximum(seq_len - missing, 0)
    # One token per request: the last stored one is this step's.
    place = tl.maximum(stored - 1, 0)
    row = request.to(tl.int64) * tl.load(table_strides + group)
    block = tl.load(table + row + place // block_size, mask=stored > 0, other=0)
    slot = block.to(tl.int64) * block_size + place % block_size
    out = layer * layer_stride + request
    inside = request < num_padded
    tl.store(layer_seq_lens + out, stored, mask=inside)
    tl.store(layer_slots + out, tl.where(stored > 0, slot, PAD), mask=inside)
