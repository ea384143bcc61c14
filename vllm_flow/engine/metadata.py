"""A step plan on the device: attention metadata and slots for the layers past the cliffs.

Seam: ``CommonAttentionMetadata`` and ``AttentionGroup.build_metadata``, the interface every
attention backend of vLLM is built through. Knows neither runner: each hands over its block tables.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_flow.engine.decoder import DeviceVariant, FlowStep
from vllm_flow.plan import StepPlan, Variant


def flow_step(
    plan: StepPlan,
    *,
    block_tables: Sequence[torch.Tensor],
    attn_groups: Sequence[Sequence[Any]],
    kv_cache_config: KVCacheConfig,
    device: torch.device,
) -> FlowStep:
    """Build what the decoder hook needs for one step.

    Args:
        plan: the step's plan; its batch indices are rows of the block tables.
        block_tables: per KV-cache group, [requests, blocks] block ids on the device.
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects.
        kv_cache_config: names the layers and the block size of each group.
    """
    on_device = [_VariantTensors(variant, device) for variant in plan.variants]
    step = FlowStep(
        variants={
            tensors.variant.first_layer: DeviceVariant(
                tensors.variant.num_rows, tensors.rows, tensors.gather
            )
            for tensors in on_device
        }
    )
    starts = tuple(variant.first_layer for variant in plan.variants)
    wanted: dict[int, list[_Place]] = {}
    for group, of_group in enumerate(attn_groups):
        for attn_group in of_group:
            by_variant = _layers_by_variant(tuple(attn_group.layer_names), starts)
            for index, names in by_variant.items():
                wanted.setdefault(index, []).append(_Place(group, attn_group, names))
    for index, places in wanted.items():
        tensors = on_device[index]
        if tensors.variant.num_rows == 0:
            continue  # the hook skips these layers
        sizes = [
            kv_cache_config.kv_cache_groups[place.group].kv_cache_spec.block_size
            for place in places
        ]
        tables = [block_tables[place.group] for place in places]
        built: dict[Any, Any] = {}
        for place, table, slots in zip(places, tables, tensors.slots(tables, sizes), strict=True):
            common = tensors.common_metadata(table, slots)
            metadata = _build(place.attn_group, common, built)
            for name in place.layer_names:
                step.attn_metadata[name] = metadata
                step.slot_mapping[name] = slots
    return step


class _Place(NamedTuple):
    """Layers of one variant that share a block table and a metadata builder."""

    group: int
    attn_group: Any
    layer_names: Sequence[str]


def _build(attn_group: Any, common: CommonAttentionMetadata, built: dict[Any, Any]) -> Any:
    """The backend's metadata; of a second storage group only what differs, where the backend can.

    Storage groups of a variant differ in block table and slots alone, so a schedule that the first
    one planned (FlashAttention 3 launches a kernel for it) serves the others.
    """
    builder = attn_group.get_metadata_builder(0)
    # With graphs, a builder keeps its schedule in one buffer: that of the layers before the cliff.
    graphs = builder.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    if (
        graphs
        or not builder.supports_update_block_table
        or attn_group.kernel_block_size is not None
    ):
        return attn_group.build_metadata(common, **({"fast_build": True} if graphs else {}))
    kind = (type(builder), replace(attn_group.kv_cache_spec, first_layer=0, last_layer=0))
    if kind in built:
        return builder.update_block_table(
            built[kind], common.block_table_tensor, common.slot_mapping
        )
    built[kind] = metadata = attn_group.build_metadata(common)
    return metadata


@lru_cache(maxsize=4096)
def _layers_by_variant(
    layer_names: tuple[str, ...], starts: tuple[int, ...]
) -> Mapping[int, Sequence[str]]:
    """Variant index -> the layers in it, given the variants' first layers; those before are in none.

    Asked in every step, and the sets of cliffs in a batch are few.
    """
    found: dict[int, list[str]] = {}
    for name in layer_names:
        index = bisect_right(starts, extract_layer_index(name)) - 1
        if index >= 0:
            found.setdefault(index, []).append(name)
    return found


class _VariantTensors:
    """One variant's integers on the device, sent in a single copy. R rows of Q requests."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        self.variant = variant
        parts = [
            variant.row_requests,
            variant.positions,
            variant.requests,
            variant.query_start_loc,
            variant.seq_lens,
            *(part for part in (variant.rows, variant.gather) if part is not None),
        ]
        host = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        if device.type == "cuda":
            host = host.pin_memory()
        tensors = list(host.to(device, non_blocking=True).split([len(part) for part in parts]))
        self.row_requests, self.positions, self.requests, self.query_start_loc, self.seq_lens = (
            tensors[:5]
        )
        rest = iter(tensors[5:])
        self.rows = next(rest) if variant.rows is not None else None
        self.gather = next(rest) if variant.gather is not None else None
        self._host = (
            torch.from_numpy(variant.query_start_loc.astype(np.int32)),
            torch.from_numpy(variant.seq_lens.astype(np.int32)),
            variant.max_query_len,
            variant.max_seq_len,
        )

    def slots(
        self, block_tables: Sequence[torch.Tensor], block_sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        """[R] slots of the rows in each table; one set of operations for tables of one block size."""
        found: dict[int, torch.Tensor] = {}
        for size in dict.fromkeys(block_sizes):
            of_size = [g for g, other in enumerate(block_sizes) if other == size]
            index = self.positions // size
            blocks_GR = torch.stack([block_tables[g][self.row_requests, index] for g in of_size])
            slots_GR = blocks_GR.to(torch.int64) * size + self.positions % size
            found.update(zip(of_size, slots_GR.unbind(), strict=True))
        return [found[g] for g in range(len(block_sizes))]

    def common_metadata(
        self, block_table: torch.Tensor, slots: torch.Tensor
    ) -> CommonAttentionMetadata:
        """Attention metadata of this variant over one group's block table, [requests, blocks]."""
        query_start_loc_cpu, seq_lens_cpu, max_query_len, max_seq_len = self._host
        num_reqs = len(self.variant.requests)
        return CommonAttentionMetadata(
            query_start_loc=self.query_start_loc,
            query_start_loc_cpu=query_start_loc_cpu,
            seq_lens=self.seq_lens,
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            num_reqs=num_reqs,
            num_actual_tokens=self.variant.num_rows,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            # Where every request has a row, as in decode, the table is taken as it is.
            block_table_tensor=block_table
            if num_reqs == len(block_table)
            else block_table.index_select(0, self.requests),
            slot_mapping=slots,
        )
