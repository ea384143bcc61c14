"""A step plan on the device: attention metadata and slots for the layers past the cliffs.

Seam: ``CommonAttentionMetadata`` and ``AttentionGroup.build_metadata``, the interface every
attention backend of vLLM is built through. Knows neither runner: each hands over its block tables.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_flow.engine.decoder import DeviceLastKeys, DeviceVariant, FlowStep
from vllm_flow.engine.hiding import hidden
from vllm_flow.engine.latent import PrefillPlans
from vllm_flow.engine.mutual_attention import as_vllm
from vllm_flow.engine.ranking import DeviceRanking, DeviceReading
from vllm_flow.engine.states import is_state
from vllm_flow.last_layer import LastLayer
from vllm_flow.rewriting import LateReading
from vllm_flow.step import Ranking, StepPlan, Variant

_Shape: TypeAlias = tuple[int, int]
"""Of a block table: tokens per block, blocks per row."""


class StepBuilder:
    """Turns plans into steps over one set of KV-cache groups.

    Args:
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects.
        kv_cache_config: names the layers and the block size of each group.
        device: where the model runs.
        graph_rows: the most rows that a CUDA graph of compiled pieces is captured for; 0 without such.
    """

    def __init__(
        self,
        attn_groups: Sequence[Sequence[Any]],
        kv_cache_config: KVCacheConfig,
        device: torch.device,
        graph_rows: int = 0,
    ) -> None:
        self.graph_rows = graph_rows
        sizes = [spec.kv_cache_spec.block_size for spec in kv_cache_config.kv_cache_groups]
        self._device = device
        self._plans = PrefillPlans()
        self._group_of_layer = {
            extract_layer_index(name): group
            for group, spec in enumerate(kv_cache_config.kv_cache_groups)
            for name in spec.layer_names
        }
        self._groups = [
            (group, sizes[group], attn_group)
            for group, of_group in enumerate(attn_groups)
            for attn_group in of_group
        ]
        # The sets of cliffs that share a batch are few, and asked for in every step.
        self._places = lru_cache(maxsize=1024)(self._find_places)

    def build(
        self,
        plan: StepPlan | None,
        block_tables: Sequence[torch.Tensor],
        padded_rows: int = 0,
        late: dict[int, list[DeviceReading]] | None = None,
    ) -> FlowStep:
        """Build what the decoder hook needs for one step.

        Args:
            plan: the step's plan; its batch indices are rows of the block tables. None where no row
                leaves and nothing is stored packed.
            block_tables: per KV-cache group, [requests, blocks] block ids on the device.
            padded_rows: rows that the model is called with, where vLLM pads the step for a CUDA graph.
            late: see :meth:`late`.
        """
        step = FlowStep(variants={}, late=late or {})
        if plan is None:
            return step
        starts = tuple(variant.first_layer for variant in plan.variants)
        found = zip(plan.variants, self._places(starts), strict=True)
        for number, (variant, places) in enumerate(found):
            tables = _tables(block_tables, places)
            tensors = _VariantTensors(variant, tables, self._device)
            # Keys of a layer need as many slots as rows. Padding stays until the first rows leave; those that
            # are left may be padded anew.
            padding = padded_rows - plan.num_rows
            if variant.rows is not None:
                padding = 0 if tensors.last else self.graph_rows - variant.num_rows
            slots = tensors.slots(block_tables, tables, max(0, padding)) if tensors.writes else {}
            step.variants[variant.first_layer] = DeviceVariant(
                variant.num_rows,
                tensors.get("rows"),
                tensors.get("gather"),
                tensors.last_keys(slots[places[0].group]) if tensors.last else None,
                tuple(self._device_ranking(r, variant, block_tables) for r in variant.rankings),
            )
            if variant.num_rows == 0:
                continue  # the hook skips these layers
            built: dict[Any, Any] = {}
            for place in places:
                if place.keeps_states and variant.continues_states:
                    continue  # what vLLM has made says the same
                common = tensors.common_metadata(block_tables[place.group], slots[place.group])
                if place.keeps_states:
                    common.is_prefilling = tensors.begins
                with self._alone(place, number):
                    metadata = _build(place.attn_group, common, built)
                for name in place.layer_names:
                    step.attn_metadata[name] = metadata
                    step.slot_mapping[name] = common.slot_mapping
        return step

    def _alone(self, place: _Place, variant: int) -> AbstractContextManager[None]:
        """While it lasts, what a builder keeps of one metadata is not that of the step's other variants."""
        builder = place.attn_group.get_metadata_builder(0)
        if place.keeps_states:  # in buffers for a captured step
            return hidden("use_full_cuda_graph", [(builder, False)])
        return self._plans.of(builder, variant)

    def late(
        self,
        readings: Iterable[LateReading],
        request_ids: Sequence[str],
        block_tables: Sequence[torch.Tensor],
    ) -> dict[int, list[DeviceReading]]:
        """What a step reads for evictions after the prefill, by layer."""
        found: dict[int, list[DeviceReading]] = {}
        for reading in readings:
            blocks = block_tables[self._group_of_layer[reading.layer]][reading.request]
            own = DeviceReading(request_ids[reading.request], reading, blocks)
            found.setdefault(reading.layer, []).append(own)
        return found

    def _device_ranking(
        self, ranking: Ranking, variant: Variant, block_tables: Sequence[torch.Tensor]
    ) -> DeviceRanking:
        """A ranking with the blocks in which the layer before the variant keeps the request."""
        group = self._group_of_layer.get(variant.first_layer - 1, 0)
        return DeviceRanking(ranking, block_tables[group][ranking.request])

    def _find_places(self, starts: tuple[int, ...]) -> list[list[_Place]]:
        """For each variant, given the first layers of all, where its layers are kept."""
        found: list[list[_Place]] = [[] for _ in starts]
        for group, size, attn_group in self._groups:
            names: dict[int, list[str]] = {}
            for name in attn_group.layer_names:
                # Layers before the first cliff are in no variant.
                index = bisect_right(starts, extract_layer_index(name)) - 1
                if index >= 0:
                    names.setdefault(index, []).append(name)
            for index, of_variant in names.items():
                states = is_state(attn_group.kv_cache_spec)
                found[index].append(_Place(group, size, attn_group, of_variant, states))
        return found


class _Place(NamedTuple):
    """Layers of one variant that share a block table and a metadata builder."""

    group: int
    block_size: int
    attn_group: Any
    layer_names: Sequence[str]
    keeps_states: bool


def _build(attn_group: Any, common: CommonAttentionMetadata, built: dict[Any, Any]) -> Any:
    """The backend's metadata; of a second storage group only what differs, where the backend can.

    Storage groups of a variant differ in block table and slots alone, so a schedule that the first
    one planned (FlashAttention 3 launches a kernel for it) serves the others.
    """
    builder = attn_group.get_metadata_builder(0)
    # With graphs, a builder keeps its schedule in one buffer: that of the layers before the cliff.
    graphs = builder.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    unscheduled = {"fast_build": True} if graphs else {}
    if not builder.supports_update_block_table or attn_group.kernel_block_size is not None:
        return attn_group.build_metadata(common, **unscheduled)
    spec = attn_group.kv_cache_spec
    kind = (type(builder), getattr(spec, "without_layers", spec))
    if kind in built:
        return builder.update_block_table(
            built[kind], common.block_table_tensor, common.slot_mapping
        )
    built[kind] = metadata = attn_group.build_metadata(common, **unscheduled)
    return metadata


class _VariantTensors:
    """One variant's integers on the device, sent in a single copy. R rows of Q requests.

    Args:
        variant: what the plan says.
        tables: shapes of the block tables that its layers use.
        device: where the model runs.
    """

    def __init__(self, variant: Variant, tables: Iterable[_Shape], device: torch.device) -> None:
        self.variant = variant
        parts = {"query_start_loc": variant.query_start_loc, "seq_lens": variant.seq_lens}
        for name in ("requests", "rows", "gather"):
            if (part := getattr(variant, name)) is not None:
                parts[name] = part
        row_requests, positions = variant.row_requests, variant.positions
        self.last = variant.last if isinstance(variant, LastLayer) else None
        if self.last is not None:
            parts |= {"last rows": self.last.rows, "last gather": self.last.gather}
            row_requests = np.concatenate((row_requests, self.last.row_requests))
            positions = np.concatenate((positions, self.last.positions))
        self.writes = len(row_requests) > 0
        for size, width in tables:
            # Where a row's block stands in the flattened table, and its slot inside the block.
            parts[f"place {size} {width}"] = row_requests * width + positions // size
            parts[f"inside {size} {width}"] = positions % size
        lengths = [len(part) for part in parts.values()]
        host = torch.from_numpy(
            np.concatenate(list(parts.values()), dtype=np.int32, casting="unsafe")
        )
        if device.type == "cuda":
            host = host.pin_memory()
        there = host.to(device, non_blocking=True)
        self._max_query_len, self._max_seq_len = variant.max_query_len, variant.max_seq_len
        self._on_host = dict(zip(parts, host.split(lengths), strict=True))
        self._on_device = dict(zip(parts, there.split(lengths), strict=True))

    def get(self, name: str) -> torch.Tensor | None:
        """``rows`` or ``gather`` on the device; None where the variant has none."""
        return self._on_device.get(name)

    @property
    def begins(self) -> torch.Tensor:
        """[Q] whether the layers see a request's first rows, on the host."""
        starts, lengths = self._on_host["query_start_loc"], self._on_host["seq_lens"]
        return starts.diff() >= lengths

    def slots(
        self,
        block_tables: Sequence[torch.Tensor],
        tables: Mapping[_Shape, Sequence[int]],
        padding: int = 0,
    ) -> dict[int, torch.Tensor]:
        """KV-cache group -> [R + padding] slots, of a last layer [R + D], its last keys' behind.

        One set of operations for tables of one shape.
        """
        found: dict[int, torch.Tensor] = {}
        for (size, width), groups in tables.items():
            place = self._on_device[f"place {size} {width}"]
            blocks_GR = torch.stack(
                [block_tables[g].reshape(-1).index_select(0, place) for g in groups]
            )
            slots_GR = blocks_GR.to(torch.int64) * size + self._on_device[f"inside {size} {width}"]
            if padding:
                slots_GR = nn.functional.pad(slots_GR, (0, padding), value=PAD_SLOT_ID)
            found.update(zip(groups, slots_GR.unbind(), strict=True))
        return found

    def last_keys(self, slots: torch.Tensor) -> DeviceLastKeys:
        """The variant's last keys, given all slots of its layer."""
        there = self._on_device
        return DeviceLastKeys(
            there["last rows"], there["last gather"], slots[self.variant.num_rows :]
        )

    def common_metadata(
        self, block_table: torch.Tensor, slots: torch.Tensor
    ) -> CommonAttentionMetadata:
        """Attention metadata of this variant over one group's block table, [requests, blocks]."""
        num_reqs = len(self.variant.requests)
        # Where every request has a row, as in decode, the table is taken as it is; runs may be as many
        # as requests and still not be theirs.
        whole = self.last is None and num_reqs == len(block_table)
        return CommonAttentionMetadata(
            query_start_loc=self._on_device["query_start_loc"],
            query_start_loc_cpu=self._on_host["query_start_loc"],
            seq_lens=self._on_device["seq_lens"],
            seq_lens_cpu_upper_bound=self._on_host["seq_lens"],
            num_reqs=num_reqs,
            num_actual_tokens=self.variant.num_rows,
            max_query_len=self._max_query_len,
            max_seq_len=self._max_seq_len,
            block_table_tensor=block_table
            if whole
            else block_table.index_select(0, self._on_device["requests"]),
            slot_mapping=slots if self.last is None else slots[: self.variant.num_rows],
            mm_req_doc_ranges=as_vllm(self.variant.mutual),
        )


def _tables(
    block_tables: Sequence[torch.Tensor], places: Sequence[_Place]
) -> dict[_Shape, list[int]]:
    """Shape of a block table -> the KV-cache groups whose tables are of that shape."""
    found: dict[_Shape, list[int]] = {}
    for place in places:
        shape = (place.block_size, block_tables[place.group].shape[1])
        found.setdefault(shape, []).append(place.group)
    return found
