"""On a CPU, what a step's storage groups have in common is made once, and what differs without detours.

vLLM prepares a step group by group. In an engine with storage groups that is several times the work of one without,
for requests that evict nothing too: schedules of the attention that are equal, and slots through a launcher
that inspects its own arguments.

Seams: ``supports_update_block_table`` and ``update_block_table`` of a backend's metadata builder, which
vLLM's CPU backend lacks; the specifications by which a runner tells builds that can be shared;
``compute_slot_mapping`` of a runner's block tables, and the operator behind it on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from vllm_flow.engine import adoption

SAME = ("num_heads", "num_kv_heads", "head_dim", "window_size", "isa", "dtype", "kv_cache_dtype")
"""What a builder's schedule is made of beside the step: of groups that differ in one nothing is shared."""


class SharedSchedule(CPUAttentionMetadataBuilder):
    """vLLM's builder for CPUs: of a second group only blocks and slots are new."""

    supports_update_block_table = True

    def update_block_table(
        self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Any:
        own = copy(metadata)
        own.block_table, own.slot_mapping = blk_table, slot_mapping
        return own


class DirectSlots:
    """Mixed in before a runner's block tables: one call of the operator for each group."""

    block_tables: list[Any]

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        starts = query_start_loc[: num_reqs + 1]
        for table in self.block_tables:
            torch.ops._C.compute_slot_mapping_kernel_impl(
                starts, positions, table.block_table.gpu, table.slot_mapping.gpu, table.block_size
            )


def share(runner: Any, kv_cache_config: Any) -> Sequence[Any] | None:
    """Make the runner's groups share; with a cache of its own, each time it gets one.

    Returns:
        The groups of the cache as the runner shall see them while it builds a step, equal where
        they differ in their layers alone; None where nothing is shared.
    """
    tables = runner.input_batch.block_table
    if runner.device.type != "cpu":
        return None
    if not isinstance(tables, DirectSlots):
        adoption.adopt(tables, DirectSlots)
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    if any(type(builder) is not CPUAttentionMetadataBuilder for builder in builders):
        return None
    kinds = {tuple(getattr(builder, name) for name in SAME) for builder in builders}
    if len(kinds) > 1:
        return None
    for builder in builders:
        adoption.adopt(builder, SharedSchedule)
    alike: dict[Any, Any] = {}
    found = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec.without_layers
        # One object: vLLM compares them in every step.
        found.append(replace(group, kv_cache_spec=alike.setdefault(spec, spec)))
    return found
