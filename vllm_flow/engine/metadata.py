"""A step plan on the device: attention metadata and slots for the layers past the cliffs.

Seam: ``CommonAttentionMetadata`` and ``AttentionGroup.build_metadata``, the interface every
attention backend of vLLM is built through. Knows neither runner: each hands over its block tables.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

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
    for group, spec in enumerate(kv_cache_config.kv_cache_groups):
        block_size = spec.kv_cache_spec.block_size
        for attn_group in attn_groups[group]:
            by_variant = _layers_by_variant(attn_group.layer_names, plan)
            for index, names in by_variant.items():
                tensors = on_device[index]
                if tensors.variant.num_rows == 0:
                    continue  # the hook skips these layers
                common = tensors.common_metadata(block_tables[group], block_size)
                metadata = attn_group.build_metadata(common)
                for name in names:
                    step.attn_metadata[name] = metadata
                    step.slot_mapping[name] = common.slot_mapping
    return step


@lru_cache(maxsize=4096)
def _layer_index(name: str) -> int:
    """vLLM parses the index out of the name; every layer is asked for in every step."""
    return extract_layer_index(name)


def _layers_by_variant(layer_names: Sequence[str], plan: StepPlan) -> dict[int, list[str]]:
    """Variant index -> the layers in it; layers before the first cliff are in none."""
    starts = [variant.first_layer for variant in plan.variants]
    found: dict[int, list[str]] = {}
    for name in layer_names:
        index = bisect_right(starts, _layer_index(name)) - 1
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
        # The same for every storage group, and there are several per step.
        self._host = (
            torch.from_numpy(variant.query_start_loc.astype(np.int32)),
            torch.from_numpy(variant.seq_lens.astype(np.int32)),
            variant.max_query_len,
            variant.max_seq_len,
        )
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _place(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] index into the request's blocks, and [R] slot inside the block."""
        if block_size not in self._places:
            self._places[block_size] = (self.positions // block_size, self.positions % block_size)
        return self._places[block_size]

    def common_metadata(
        self, block_table: torch.Tensor, block_size: int
    ) -> CommonAttentionMetadata:
        """Attention metadata of this variant over one group's block table, [requests, blocks]."""
        index, inside = self._place(block_size)
        block = block_table[self.row_requests, index]
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
            slot_mapping=block.to(torch.int64) * block_size + inside,
        )
