"""Prepares a step's storage groups on a CPU: what they have in common is computed once.

vLLM prepares a step group by group. With storage groups this is several times stock vLLM's work, even for requests that
evict nothing. Three things are saved here: attention schedules that are equal in all groups, the slow launch of the
kernel that computes slots (it inspects its arguments on every call), and views of tables and slots that have not
changed since the step before.

Seams: ``supports_update_block_table`` and ``update_block_table`` of a backend's metadata builder, which
vLLM's CPU backend lacks; the groups of its KV cache that a runner sees while it builds a step, and the slots that it
takes views of; ``compute_slot_mapping`` and ``commit_block_table`` of a runner's block tables, and their buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.block_table import SlotMappingMode

from vllm_flow.engine import adoption

Made = TypeVar("Made")

SAME = ("num_heads", "num_kv_heads", "head_dim", "window_size", "isa", "dtype", "kv_cache_dtype")
"""What a builder's schedule is made of beside the step: of groups that differ in one nothing is shared."""


class SharedSchedule(CPUAttentionMetadataBuilder):
    """vLLM's builder for CPUs: of a second group only blocks and slots are new."""

    supports_update_block_table = True

    def update_block_table(
        self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Any:
        # What copy.copy gives, in a fifth of its time.
        own = object.__new__(type(metadata))
        vars(own).update(vars(metadata), block_table=blk_table, slot_mapping=slot_mapping)
        return own


class Remembered(dict[int, Made]):
    """What is made of a number of requests or tokens. Steps that decode have the same number again and again."""

    AT_MOST = 256
    """Numbers. Steps of prompts have any, and theirs would not end."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, number: int) -> Made:
        if len(self) >= self.AT_MOST:
            self.clear()
        made = self[number] = self._make(number)
        return made


class SharedBuild:
    """What is built of a step for one group, for the others that differ from it in their layers alone.

    Args:
        config: the runner's own copy of vLLM's KV cache config.
        seen: its groups as the runner shall see them while it builds a step.
        builder: of the first group.
        tables: the runner's block tables, one per group.
    """

    def __init__(
        self, config: Any, seen: Sequence[Any], builder: SharedSchedule, tables: Sequence[Any]
    ) -> None:
        self.config, self.seen = config, seen
        self._builder, self._tables = builder, tables
        self._layers = [group.layer_names for group in config.kv_cache_groups]
        self._unseen = [*enumerate(self._layers)][len(seen) :]
        self._table_views = Remembered(
            lambda requests: [table.get_device_tensor(requests) for table in tables]
        )
        self._slot_views = Remembered(self._views_of_slots)

    def _views_of_slots(
        self, tokens: int
    ) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]:
        views = [table.slot_mapping.gpu[:tokens] for table in self._tables]
        return dict(enumerate(views)), {
            name: view for names, view in zip(self._layers, views, strict=True) for name in names
        }

    def slot_mappings(self, tokens: int) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]:
        """The slots of a step of that many tokens, none of them padding, by group and by layer: views of what
        the runner's block tables compute."""
        by_group, by_layer = self._slot_views[tokens]
        return by_group.copy(), by_layer.copy()

    def build(self, build: Callable[..., Made], *args: Any, **kwargs: Any) -> Made:
        """What the runner makes of some arguments while it sees no other groups."""
        # Without a context manager: it would take as long as what is left to do.
        whole, self.config.kv_cache_groups = self.config.kv_cache_groups, self.seen
        try:
            return build(*args, **kwargs)
        finally:
            self.config.kv_cache_groups = whole

    def spread(
        self, metadata_of_layer: dict[str, Any], slot_mappings: Mapping[int, torch.Tensor]
    ) -> None:
        """Add the layers of groups that the runner did not see to those of the first."""
        built = metadata_of_layer[self._layers[0][0]]
        tables, update = self._table_views[len(built.block_table)], self._builder.update_block_table
        for group, layers in self._unseen:
            own = update(built, tables[group], slot_mappings[group])
            for name in layers:
                metadata_of_layer[name] = own


@dataclass(frozen=True)
class _Stack:
    """Groups whose tables have the same shape, one behind another."""

    block_size: int
    """Tokens."""
    blocks_GQB: NDArray[np.int32]
    """[groups, rows of requests, blocks of a request]."""
    slots_GT: NDArray[np.int64]
    """[groups, tokens of a step]."""

    @classmethod
    def of(cls, tables: Sequence[Any]) -> _Stack:
        """Give some groups' tables one memory, with what they hold. The device's tables are the host's, too, as vLLM
        does it for the tables that it makes before it knows the groups."""
        blocks_GQB = torch.stack([table.block_table.cpu for table in tables])
        slots_GT = torch.stack([table.slot_mapping.gpu for table in tables])
        for table, blocks_QB, slots_T in zip(tables, blocks_GQB, slots_GT, strict=True):
            for buffer, memory in ((table.block_table, blocks_QB), (table.slot_mapping, slots_T)):
                buffer.cpu = buffer.gpu = memory
                buffer.np = memory.numpy()
        return cls(tables[0].block_size, blocks_GQB.numpy(), slots_GT.numpy())

    def fill(self, rows_T: NDArray[np.int64], positions_T: NDArray[np.int64]) -> None:
        """Compute the slots of tokens by the rows of their requests and their positions there."""
        block_T, offset_T = np.divmod(positions_T, self.block_size)
        slots_GT = self.slots_GT[:, : len(rows_T)]
        np.multiply(
            self.blocks_GQB[:, rows_T, block_T], self.block_size, out=slots_GT, dtype=np.int64
        )
        slots_GT += offset_T


class StackedTables:
    """Mixed in before a runner's block tables: the slots of all groups are computed at once, and nothing is copied."""

    flow_stacks: list[_Stack]

    def commit_block_table(self, num_reqs: int) -> None:
        """The device's tables are the host's, see :class:`_Stack`."""

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        starts = query_start_loc[: num_reqs + 1].numpy()
        rows_T = np.arange(num_reqs).repeat(starts[1:] - starts[:-1])
        positions_T = positions[: len(rows_T)].numpy()
        for each in self.flow_stacks:
            each.fill(rows_T, positions_T)


def stack(tables: Any) -> None:
    """Turn a runner's block tables into :class:`StackedTables`."""
    alike: dict[Any, list[Any]] = {}
    for table in tables.block_tables:
        shape = tuple(table.block_table.cpu.shape)
        alike.setdefault((table.slot_mapping_mode, table.block_size, shape), []).append(table)
    stacks = {kind: _Stack.of(group) for kind, group in alike.items()}
    # Layers with states look up their blocks by request, and have no slots.
    with_slots = [found for (mode, *_), found in stacks.items() if mode is not SlotMappingMode.NONE]
    adoption.adopt(tables, StackedTables, flow_stacks=with_slots)


def share(runner: Any) -> SharedBuild | None:
    """Make the runner's groups share; with a cache of its own, each time it gets one.

    Returns:
        What is built once; None where nothing is shared.
    """
    tables = runner.input_batch.block_table
    if runner.device.type != "cpu":
        return None
    if not isinstance(tables, StackedTables):
        stack(tables)
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    if any(type(builder) is not CPUAttentionMetadataBuilder for builder in builders):
        return None
    kinds = {tuple(getattr(builder, name) for name in SAME) for builder in builders}
    if len(kinds) > 1:
        return None
    for builder in builders:
        adoption.adopt(builder, SharedSchedule)
    drafts = runner.speculative_config is not None
    return shared_build(runner.kv_cache_config, builders, tables.block_tables, drafts)


def shared_build(
    config: Any, builders: Sequence[Any], tables: Sequence[Any], drafts: bool
) -> SharedBuild:
    """Of which groups a runner builds metadata itself.

    Args:
        config: its KV cache config.
        builders: of all groups; they make the same schedule.
        tables: the block tables of all groups.
        drafts: whether there is a drafter, which looks for its group among those that the runner builds for.
    """
    alike: dict[Any, Any] = {}
    seen = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec.without_layers
        # One object: vLLM compares them in every step.
        seen.append(replace(group, kv_cache_spec=alike.setdefault(spec, spec)))
    one = len(alike) == 1 and len(builders) == len(seen) and not drafts
    # Where vLLM sees one group, it need not remember for another what it has built.
    builders[0].supports_update_block_table = not one
    return SharedBuild(config, seen[:1] if one else seen, builders[0], tables)
