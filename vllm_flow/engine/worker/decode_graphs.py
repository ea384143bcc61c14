"""Attention metadata of captured decode steps: a row per decoder layer, in memory that never moves.

A CUDA graph replays kernels over the addresses it was captured with, and no Python runs in between. So
every layer is captured with metadata of its own, which points into the tensors here; before each
replay one kernel writes into them what each layer sees of each request.

Seams: ``CommonAttentionMetadata`` and the backends' metadata builders. Only backends whose metadata is
nothing but such pointers can be captured like this (:data:`REPLAYABLE`).

A drafter's layers (`draft_layers`) see every token, so vLLM's own metadata serve them.

Legend: L decoder layers, R requests of the step, padded to a captured size; N rows, as many of each
request: its one token, and the drafts behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.model_executor.models.utils import extract_layer_index
from vllm.triton_utils import tl, triton
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_flow.engine.draft_layers import layer_in_group
from vllm_flow.engine.worker.device_step import DeviceStep
from vllm_flow.engine.worker.sending import snapshot
from vllm_flow.engine.worker.variant_builders import PLANNING, decodes_without_plan

REPLAYABLE = ("FLASH_ATTN", "TRITON_ATTN")
"""Backends whose kernels read lengths, tables and slots from the device, and nothing planned on the host.

FlashAttention 3 plans its work inside the kernel where no schedule is handed to it (``fast_build``). So it is with
FlashInfer where it decodes with TRT-LLM's kernels or XQA, see :func:`decodes_without_plan`.
"""

REQUESTS = 128
"""Of one program. A constant: Triton compiles a kernel anew for each value, and a step has any number."""


def unreplayable(attn_groups: Sequence[Sequence[Any]]) -> str | None:
    """Which of the attention backends cannot be captured like this, and why; None if all can."""
    for attn_group in (found for of_group in attn_groups for found in of_group):
        backend = attn_group.backend.get_name()
        if backend in PLANNING and not decodes_without_plan(attn_group):
            return f"{backend} (with vLLM-Flow, it has full graphs where it decodes with TRT-LLM's kernels)"
        if backend not in (*REPLAYABLE, *PLANNING):
            return f"{backend} (with vLLM-Flow, {' and '.join(REPLAYABLE)} have full graphs)"
        if attn_group.kernel_block_size is not None:
            size = attn_group.kv_cache_spec.block_size
            return (
                f"{backend} dividing KV blocks of {size} tokens (with vLLM-Flow, full graphs need "
                f"--block-size {attn_group.kernel_block_size})"
            )
    return None


def of_drafters(attn_groups: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Per KV-cache group, the attention groups that a drafter's layers are among."""
    return [[group for group in of_group if _has_drafters(group)] for of_group in attn_groups]


def are_drafters(attn_groups: Sequence[Sequence[Any]]) -> bool:
    """Whether these are a drafter's own attention groups: no layer in them is the target's."""
    return not any(_targets(g.layer_names, g.kv_cache_spec) for gs in attn_groups for g in gs)


class DecodeBuffers:
    """Lengths and slots of every layer, and the kernel that brings them up to date.

    Args:
        block_tables: per KV-cache group, vLLM's persistent table, [>= R, blocks] int32. Kept: the
            captured kernels read the same memory.
        kv_cache_config: names the layers and the block size of each group.
        num_layers: decoder layers.
        max_reqs: most requests of a step.
        rows_per_req: most rows of a request in it.
    """

    def __init__(
        self,
        block_tables: Sequence[torch.Tensor],
        kv_cache_config: KVCacheConfig,
        num_layers: int,
        max_reqs: int,
        rows_per_req: int = 1,
    ) -> None:
        groups = kv_cache_config.kv_cache_groups
        device = block_tables[0].device
        group_of_layer = [0] * num_layers
        for group, spec in enumerate(groups):
            for layer in _targets(spec.layer_names, spec.kv_cache_spec).values():
                group_of_layer[layer] = group

        def integers(values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.seq_lens_LR = torch.zeros(num_layers, max_reqs, dtype=torch.int32, device=device)
        self.slots_LN = torch.full(
            (num_layers, max_reqs * rows_per_req), PAD_SLOT_ID, dtype=torch.int64, device=device
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
        # Captures and dummy steps never refresh: it would be compiled in the first step of a request.
        self.refresh(self.seq_lens_LR[0], None, 0)

    @property
    def num_layers(self) -> int:
        return len(self.seq_lens_LR)

    def stand_on(self, block_tables: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tables the buffers were made for; profiling uses others."""
        return [t.data_ptr() for t in block_tables] == [t.data_ptr() for t in self._tables]

    def blank(self, seq_lens_R: torch.Tensor) -> None:
        """A step of requests that nobody sent: lengths as given in every layer, no slot written."""
        self.seq_lens_LR[:, : len(seq_lens_R)] = seq_lens_R
        self.slots_LN.fill_(PAD_SLOT_ID)

    def refresh(
        self,
        seq_lens_R: torch.Tensor,
        facts_S2Q: NDArray[np.int32] | None,
        num_reqs: int,
        rows_per_req: int = 1,
    ) -> None:
        """Bring every layer's lengths and slots up to date; waits for nothing.

        Args:
            seq_lens_R: tokens of each request after the step, padding included, on the device.
            facts_S2Q: :func:`vllm_flow.decode_plan.decode_facts` of the Q = ``num_reqs`` requests
                before the padding; None where none of them evicts.
            rows_per_req: rows of each, of padding, too.
        """
        num_stages = 0
        if facts_S2Q is not None:
            num_stages = len(facts_S2Q)
            host = snapshot(torch.from_numpy(facts_S2Q), self._facts.device)
            self._facts[: host.numel()].copy_(host.view(-1), non_blocking=True)
        _refresh_kernel[(self.num_layers, triton.cdiv(len(seq_lens_R), REQUESTS))](
            seq_lens_R,
            self._facts,
            self._group_of_layer,
            self._table_pointers,
            self._table_strides,
            self._block_sizes,
            self.seq_lens_LR,
            self.slots_LN,
            self.seq_lens_LR.stride(0),
            self.slots_LN.stride(0),
            num_stages,
            num_reqs,
            len(seq_lens_R),
            rows_per_req,
            PAD=PAD_SLOT_ID,
            BLOCK=REQUESTS,
        )

    def capture(
        self,
        input_batch: Any,
        block_tables: Sequence[torch.Tensor],
        attn_groups: Sequence[Sequence[Any]],
        max_seq_len: int,
    ) -> DeviceStep:
        """What a decode step is captured with: each layer's metadata and slots.

        Args:
            input_batch: vLLM's dummy batch of R requests with as many tokens each.
            max_seq_len: longest request that a replay may see.
        """
        num_reqs, num_rows = input_batch.num_reqs, input_batch.num_tokens
        rows_per_req = num_rows // num_reqs
        self.blank(input_batch.seq_lens[:num_reqs])
        step = DeviceStep(variants={})
        for group, table in enumerate(block_tables):
            for attn_group in attn_groups[group]:
                layers = _targets(attn_group.layer_names, attn_group.kv_cache_spec)
                for name, layer in layers.items():
                    slots = self.slots_LN[layer, :num_rows]
                    common = CommonAttentionMetadata(
                        query_start_loc=input_batch.query_start_loc[: num_reqs + 1],
                        query_start_loc_cpu=rows_per_req
                        * torch.arange(num_reqs + 1, dtype=torch.int32),
                        seq_lens=self.seq_lens_LR[layer, :num_reqs],
                        seq_lens_cpu_upper_bound=torch.full(
                            (num_reqs,), max_seq_len, dtype=torch.int32
                        ),
                        num_reqs=num_reqs,
                        num_actual_tokens=num_rows,
                        max_query_len=rows_per_req,
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


@lru_cache(maxsize=4096)
def _index_of(name: str) -> int:
    """vLLM takes the whole name apart for it, which is too much for every layer in every step."""
    return extract_layer_index(name)


def _targets(names: Iterable[str], spec: Any) -> dict[str, int]:
    """The target's attention layers among those of one storage group, by name."""
    found = {name: layer_in_group(name, _index_of(name), spec) for name in names}
    return {name: layer for name, layer in found.items() if layer >= 0}


def _has_drafters(attn_group: Any) -> bool:
    names = attn_group.layer_names
    return len(_targets(names, attn_group.kv_cache_spec)) < len(names)


@triton.jit(do_not_specialize=["num_stages", "num_reqs", "num_padded", "rows_per_req"])
def _refresh_kernel(
    seq_lens,  # [R]
    facts,  # [num_stages, 2, num_reqs]: first layer, tokens missing from it on
    group_of_layer,  # [L]
    table_pointers,  # [groups]
    table_strides,  # [groups]
    block_sizes,  # [groups]
    layer_seq_lens,  # [L, max R]
    layer_slots,  # [L, max N]
    seq_lens_stride,
    slots_stride,
    num_stages,
    num_reqs,
    num_padded,
    rows_per_req,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    group = tl.load(group_of_layer + layer)
    block_size = tl.load(block_sizes + group)
    table = tl.load(table_pointers + group).to(tl.pointer_type(tl.int32))
    request = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
    inside = request < num_padded
    tl.store(layer_seq_lens + layer * seq_lens_stride + request, stored, mask=inside)
    table_row = table + request.to(tl.int64) * tl.load(table_strides + group)
    slots = layer_slots + layer * slots_stride + request * rows_per_req
    # The last stored tokens are this step's.
    for row in range(rows_per_req):
        place = stored - rows_per_req + row
        there = place >= 0
        place = tl.maximum(place, 0)
        block = tl.load(table_row + place // block_size, mask=there, other=0)
        slot = block.to(tl.int64) * block_size + place % block_size
        tl.store(slots + row, tl.where(there, slot, PAD), mask=inside)
