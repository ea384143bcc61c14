"""A step plan on the device: attention metadata and slots for the layers past the cliffs.

Seam: ``CommonAttentionMetadata`` and ``AttentionGroup.build_metadata``, the interface every
attention backend of vLLM is built through. Knows neither runner: each hands over its block tables.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_flow.engine.draft_layers import layer_in_group
from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.states import is_state
from vllm_flow.engine.worker import shared_metadata
from vllm_flow.engine.worker.choosing.device_ranking import DeviceRanking, DeviceReading
from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
from vllm_flow.engine.worker.latent import PrefillPlans
from vllm_flow.engine.worker.step_inputs import StepInputs
from vllm_flow.engine.worker.variant_builders import VariantBuilders
from vllm_flow.engine.worker.variant_tensors import Shape, VariantTensors
from vllm_flow.handing_on import NOTHING, Handing
from vllm_flow.rewriting import LateReading
from vllm_flow.step import Ranking, StepPlan, Variant


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
        self._plans, self._builders = PrefillPlans(), VariantBuilders()
        self._group_of_layer = {
            layer_in_group(name, extract_layer_index(name), spec.kv_cache_spec): group
            for group, spec in enumerate(kv_cache_config.kv_cache_groups)
            for name in spec.layer_names
        }
        self._groups = [
            (group, sizes[group], attn_group)
            for group, of_group in enumerate(attn_groups)
            for attn_group in of_group
        ]
        # The sets of cliffs that share a batch are few, and asked for in every step.
        self._layer_groups = lru_cache(maxsize=1024)(self._find_layer_groups)

    def build(
        self,
        plan: StepPlan | None,
        inputs: StepInputs,
        late: dict[int, list[DeviceReading]] | None = None,
        handing: Handing = NOTHING,
    ) -> DeviceStep:
        """Build what the decoder hook needs for one step.

        Args:
            plan: the step's plan; its batch indices are rows of the block tables. None where no row
                leaves and nothing is stored packed.
            late: see :meth:`late`.
            handing: what a pipeline's stages tell one another of it.
        """
        # Whose pictures and question it is, and of no layer here.
        later = (DeviceRanking(r, inputs.block_tables[0][r.request]) for r in handing.looks)
        step = DeviceStep(
            variants={}, late=late or {}, later=tuple(later), told=handing.told, tells=handing.tells
        )
        if plan is None:
            return step
        rejected = None if inputs.lengths is None else inputs.lengths.rejected_tokens()
        starts = tuple(variant.first_layer for variant in plan.variants)
        found = zip(plan.variants, self._layer_groups(starts), strict=True)
        for number, (variant, layer_groups) in enumerate(found):
            tables = _tables(inputs.block_tables, layer_groups)
            states = [_shape(inputs.block_tables, g) for g in layer_groups if g.keeps_states]
            tensors = VariantTensors(
                variant,
                tables,
                self._device,
                plan.seq_lens,
                states[0] if states else None,
                rejected,
            )
            slots: dict[int, torch.Tensor] = {}
            if tensors.writes:
                padding = self._padding(plan, tensors, inputs)
                slots = tensors.slots(inputs.block_tables, padding)
            step.variants[variant.first_layer] = DeviceVariant(
                variant.num_rows,
                tensors.rows,
                tensors.gather,
                tensors.last_keys(slots[layer_groups[0].group]) if tensors.last else None,
                tuple(self._device_ranking(r, variant, inputs) for r in variant.rankings),
            )
            if variant.num_rows:  # else the hook skips these layers
                self._add_metadata(step, number, tensors, layer_groups, slots, inputs)
        return step

    def _padding(self, plan: StepPlan, tensors: VariantTensors, inputs: StepInputs) -> int:
        """Rows behind a variant's own that have slots, too, as keys of a layer need as many as there are rows.

        The step's padding stays until the first rows leave; those that are left may be padded anew.
        """
        variant = tensors.variant
        if variant.rows is None:
            return max(0, inputs.padded_rows - plan.num_rows)
        return 0 if tensors.last else max(0, self.graph_rows - variant.num_rows)

    def _add_metadata(
        self,
        step: DeviceStep,
        number: int,
        tensors: VariantTensors,
        layer_groups: Sequence[_LayerGroup],
        slots: dict[int, torch.Tensor],
        inputs: StepInputs,
    ) -> None:
        """What a variant's layers attend by, of every storage group that they are in.

        Args:
            number: of the variant in its step.
            slots: KV-cache group -> slots of the variant's rows.
        """
        counts = inputs.draft_counts
        of_drafts = None if counts is None else counts.builder_arguments(tensors)
        built: dict[Any, Any] = {}
        for layers in layer_groups:
            table = inputs.block_tables[layers.group]
            own = table
            if layers.keeps_states:
                if tensors.variant.continues_states:
                    continue  # what vLLM has made says the same
                slots_of_drafts = layers.attn_group.kv_cache_spec.num_speculative_blocks
                table = tensors.states(table, 1 + slots_of_drafts)
                own = _wherever(table, inputs.block_tables[layers.group])
            common = tensors.common_metadata(own, slots[layers.group], layers.keeps_states)
            with self._alone(layers, number, table):
                metadata = _build(
                    layers.attn_group,
                    common,
                    built,
                    of_drafts if layers.keeps_states else None,
                )
            for name in layers.layer_names:
                step.attn_metadata[name] = metadata
                step.slot_mapping[name] = common.slot_mapping

    def _alone(
        self, layers: _LayerGroup, variant: int, table: torch.Tensor
    ) -> AbstractContextManager[None]:
        """While it lasts, what a builder keeps of one metadata is not that of the step's other variants."""
        builder = layers.attn_group.get_metadata_builder(0)
        if layers.keeps_states:
            return _outside_buffers(builder, table)
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
        self, ranking: Ranking, variant: Variant, inputs: StepInputs
    ) -> DeviceRanking:
        """A ranking with the blocks in which the layer before the variant keeps the request."""
        group = self._group_of_layer.get(variant.first_layer - 1, 0)
        return DeviceRanking(ranking, inputs.block_tables[group][ranking.request])

    def _find_layer_groups(self, starts: tuple[int, ...]) -> list[list[_LayerGroup]]:
        """For each variant, given the first layers of all, where its layers are kept."""
        found: list[list[_LayerGroup]] = [[] for _ in starts]
        for group, size, attn_group in self._groups:
            names: dict[int, list[str]] = {}
            for name in attn_group.layer_names:
                # Layers before the first cliff are in no variant; nor are a drafter's, which come before all.
                layer = layer_in_group(name, extract_layer_index(name), attn_group.kv_cache_spec)
                index = bisect_right(starts, layer) - 1
                if index >= 0:
                    names.setdefault(index, []).append(name)
            states = is_state(attn_group.kv_cache_spec)
            for number, index in enumerate(sorted(names)):
                own = self._builders.of(attn_group, number)
                found[index].append(_LayerGroup(group, size, own, names[index], states))
        return found


@contextmanager
def _outside_buffers(builder: Any, table: torch.Tensor) -> Iterator[None]:
    """While it lasts, a builder of layers with states keeps nothing in what it has for captured steps.

    Args:
        table: [Q, slots] states, see :meth:`VariantTensors.states`.
    """
    with (
        # In buffers for a captured step, as Gated DeltaNet's builder is asked, and the others.
        replaced("use_full_cuda_graph", [(builder, False)]),
        replaced("decode_cudagraph_max_bs", [(builder, -1)]),
        # Some builders take states as the runner has looked them up.
        replaced("mamba_aligned_state_indices", [(builder, table)]),
    ):
        yield


class _LayerGroup(NamedTuple):
    """Layers of one variant that share a block table and a metadata builder."""

    group: int
    block_size: int
    attn_group: Any
    layer_names: Sequence[str]
    keeps_states: bool


def _build(
    attn_group: Any,
    common: CommonAttentionMetadata,
    built: dict[Any, Any],
    of_drafts: dict[str, torch.Tensor] | None = None,
) -> Any:
    """A variant's metadata in one storage group, from what was built of it in others, where the backend can.

    Args:
        of_drafts: of layers with states, see
            :meth:`~vllm_flow.engine.worker.step_inputs.DraftCounts.builder_arguments`.
    """
    builder = attn_group.get_metadata_builder(0)
    # With graphs, a builder keeps its schedule in one buffer: that of the layers before the cliff.
    graphs = builder.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    own: dict[str, Any] = {"fast_build": True} if graphs else {}
    return shared_metadata.build(attn_group, common, built, **own, **(of_drafts or {}))


def _wherever(states: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """A table of states [Q, 1] with each in every column, as wide as the group's own: a builder that looks a state up
    by the rows that are left finds it.
    """
    return states.expand(-1, block_table.shape[1]) if states.shape[1] == 1 else states


def _shape(block_tables: Sequence[torch.Tensor], layers: _LayerGroup) -> Shape:
    return layers.block_size, block_tables[layers.group].shape[1]


def _tables(
    block_tables: Sequence[torch.Tensor], layer_groups: Sequence[_LayerGroup]
) -> dict[Shape, list[int]]:
    """Shape of a block table -> the KV-cache groups whose tables are of that shape."""
    found: dict[Shape, list[int]] = {}
    for layers in layer_groups:
        found.setdefault(_shape(block_tables, layers), []).append(layers.group)
    return found
