"""On a CPU, what a step's storage groups have in common is made once, and what differs without detours.

vLLM prepares a step group by group. In an engine with storage groups that is several times the work of one without,
for requests that evict nothing too: schedules of the attention that are equal, and slots through a launcher
that inspects its own arguments.

Seams: ``supports_update_block_table`` and ``update_block_table`` of a backend's metadata builder, which
vLLM's CPU backend lacks; the groups of its KV cache that a runner sees while it builds a step;
``compute_slot_mapping`` and ``commit_block_table`` of a runner's block tables, and the operator behind the former
on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class SharedBuild:
    """What is built of a step for one group, for the others that differ from it in their layers alone."""

    config: Any
    """The runner's own copy of vLLM's KV cache config."""
    seen: Sequence[Any]
    """Its groups as the runner shall see them while it builds a step."""
    builder: SharedSchedule
    """Of the first group."""

    def spread(
        self,
        metadata_of_layer: dict[str, Any],
        block_tables: Any,
        slot_mappings: Mapping[int, torch.Tensor],
    ) -> None:
        """Add the layers of groups that the runner did not see to those of the first."""
        built = metadata_of_layer[self.seen[0].layer_names[0]]
        requests = len(built.block_table)
        for group in range(len(self.seen), len(self.config.kv_cache_groups)):
            own = self.builder.update_block_table(
                built, block_tables[group].get_device_tensor(requests), slot_mappings[group]
            )
            for name in self.config.kv_cache_groups[group].layer_names:
                metadata_of_layer[name] = own


class DirectSlots:
    """Mixed in before a runner's block tables: one call of the operator for each group, and no copies."""

    block_tables: list[Any]

    def commit_block_table(self, num_reqs: int) -> None:
        """The device's tables are the host's, see :func:`share`."""

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        starts = query_start_loc[: num_reqs + 1]
        for table in self.block_tables:
            torch.ops._C.compute_slot_mapping_kernel_impl(
                starts, positions, table.block_table.gpu, table.slot_mapping.gpu, table.block_size
            )


def share(runner: Any) -> SharedBuild | None:
    """Make the runner's groups share; with a cache of its own, each time it gets one.

    Returns:
        What is built once; None where nothing is shared.
    """
    tables = runner.input_batch.block_table
    if runner.device.type != "cpu":
        return None
    if not isinstance(tables, DirectSlots):
        adoption.adopt(tables, DirectSlots)
        for table in tables.block_tables:
            # As vLLM does it for the tables that it makes before it knows the groups.
            table.block_table.gpu = table.block_table.cpu
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    if any(type(builder) is not CPUAttentionMetadataBuilder for builder in builders):
        return None
    kinds = {tuple(getattr(builder, name) for name in SAME) for builder in builders}
    if len(kinds) > 1:
        return None
    for builder in builders:
        adoption.adopt(builder, SharedSchedule)
    return shared_build(runner.kv_cache_config, builders, runner.speculative_config is not None)


def shared_build(config: Any, builders: Sequence[Any], drafts: bool) -> SharedBuild:
    """Of which groups a runner builds metadata itself.

    Args:
        config: its KV cache config.
        builders: of all groups; they make the same schedule.
        drafts: whether there is a drafter, which looks for its group among those that the runner builds for.
    """
    alike: dict[Any, Any] = {}
    seen = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec.without_layers
        # One object: vLLM compares them in every step.
        seen.append(replace(group, kv_cache_spec=alike.setdefault(spec, spec)))
    one = len(alike) == 1 and len(builders) == len(seen) and not drafts
    return SharedBuild(config, seen[:1] if one else seen, builders[0])
