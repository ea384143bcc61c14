"""One variant of a step on the device: its integers, sent in one copy, and what is read off them.

Knows vLLM's ``CommonAttentionMetadata``, and neither layers nor backends: what a step is made of, `metadata` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_flow.engine.mutual_attention import as_vllm
from vllm_flow.engine.worker.aligned import filled
from vllm_flow.engine.worker.device_step import DeviceLastKeys
from vllm_flow.engine.worker.sending import OneCopy
from vllm_flow.last_layer import LastLayer
from vllm_flow.spans import IntArray
from vllm_flow.step import Variant

Shape: TypeAlias = tuple[int, int]
"""Of a block table: tokens per block, blocks per row."""

Integers = TypeVar("Integers", IntArray, torch.Tensor)


def _places(requests: Integers, positions: Integers, table: Shape) -> tuple[Integers, Integers]:
    """Where in a flattened block table the block of each position stands, and its slot inside the block."""
    size, width = table
    return requests * width + positions // size, positions % size


class VariantTensors:
    """One variant's integers on the device, sent in a single copy. R rows of Q requests.

    Args:
        variant: what the plan says.
        tables: shape of a block table -> KV-cache groups whose tables have it, among those that its layers are in.
        device: where the model runs.
        seq_lens: [N] tokens of each request of the batch after the step, by which its state is found.
        of_states: shape of the tables of states, None where its layers have none.
        rejected_tokens: see :meth:`vllm_flow.engine.worker.step_inputs.Lengths.rejected_tokens`. With it positions and
            lengths are as the device knows them; lengths on the host stay upper bounds.
    """

    def __init__(
        self,
        variant: Variant,
        tables: Mapping[Shape, Sequence[int]],
        device: torch.device,
        seq_lens: IntArray,
        of_states: Shape | None = None,
        rejected_tokens: torch.Tensor | None = None,
    ) -> None:
        self.variant, self._tables = variant, tables
        self.last = variant.last if isinstance(variant, LastLayer) else None
        owners, positions = variant.row_requests, variant.positions
        copy = OneCopy()
        self._starts, self._lengths = copy.add(variant.query_start_loc), copy.add(variant.seq_lens)
        self._requests = copy.add(variant.requests)
        self._rows = None if variant.rows is None else copy.add(variant.rows)
        self._gather = None if variant.gather is None else copy.add(variant.gather)
        if self.last is not None:
            self._last = copy.add(self.last.rows), copy.add(self.last.gather)
            owners, positions = filled(owners), filled(positions)
            self._last_slot = len(owners)
            owners = np.concatenate((owners, self.last.row_requests))
            positions = np.concatenate((positions, self.last.positions))
        self._num_slots = len(owners)
        self.writes = self._num_slots > 0
        owners, positions = filled(owners), filled(positions)
        self._max_query_len, self._max_seq_len = variant.max_query_len, variant.max_seq_len
        # In the last block that a request has by the end of the step, whatever of it left, is its state.
        newest = None if of_states is None else (of_states, seq_lens[variant.requests] - 1)
        self._states: torch.Tensor | None = None
        """[Q] where the block of each request's state stands in a flattened table."""
        if rejected_tokens is None:
            self._send(copy, owners, positions, newest, device)
        else:
            self._send_told(copy, owners, positions, newest, rejected_tokens)

    def _send(
        self,
        copy: OneCopy,
        owners: IntArray,
        positions: IntArray,
        newest: tuple[Shape, IntArray] | None,
        device: torch.device,
    ) -> None:
        """Send what the host knows, as far as it can work that out."""
        places = {table: _places(owners, positions, table) for table in self._tables}
        parts = {table: (copy.add(at), copy.add(inside)) for table, (at, inside) in places.items()}
        states = None
        if newest is not None:
            states = copy.add(_places(self.variant.requests, newest[1], newest[0])[0])
        copy.send(device)
        self._places = {table: (at.there, inside.there) for table, (at, inside) in parts.items()}
        if states is not None:
            self._states = states.there
        self.seq_lens = self._lengths.there
        """[Q] stored tokens of each request after the step, on the device."""

    def _send_told(
        self,
        copy: OneCopy,
        owners: IntArray,
        positions: IntArray,
        newest: tuple[Shape, IntArray] | None,
        rejected_tokens: torch.Tensor,
    ) -> None:
        """Send what the host was told, and work the rest out on the device, which knows what was rejected since."""
        rows, told = copy.add(owners), copy.add(positions)
        ends = None if newest is None else copy.add(newest[1])
        copy.send(rejected_tokens.device)
        rejected = rejected_tokens.to(torch.int32)
        known = told.there - rejected[rows.there]
        self._places = {table: _places(rows.there, known, table) for table in self._tables}
        of_requests = rejected[self.requests]
        if newest is not None and ends is not None:
            self._states = _places(self.requests, ends.there - of_requests, newest[0])[0]
        self.seq_lens = self._lengths.there - of_requests

    @property
    def requests(self) -> torch.Tensor:
        """[Q] batch indices of the variant's requests, on the device."""
        return self._requests.there

    @property
    def rows(self) -> torch.Tensor | None:
        """[R] rows of the step, on the device; None where all are alive."""
        return None if self._rows is None else self._rows.there

    @property
    def gather(self) -> torch.Tensor | None:
        """[R] rows of the variant before, on the device; None where nothing is dropped."""
        return None if self._gather is None else self._gather.there

    @property
    def _begins(self) -> torch.Tensor:
        """[Q] whether the layers see a request's first rows, on the host."""
        return self._starts.host.diff() >= self._lengths.host

    def slots(
        self, block_tables: Sequence[torch.Tensor], padding: int = 0
    ) -> dict[int, torch.Tensor]:
        """KV-cache group -> [R + padding] slots, of a last layer its last keys' behind, see :meth:`last_keys`.

        One set of operations for tables of one shape.
        """
        found: dict[int, torch.Tensor] = {}
        for table, groups in self._tables.items():
            at, inside = self._places[table]
            blocks_GR = torch.stack(
                [block_tables[g].reshape(-1).index_select(0, at) for g in groups]
            )
            slots_GR = blocks_GR.to(torch.int64) * table[0] + inside
            end = self._num_slots + padding
            if padding:
                slots_GR = nn.functional.pad(
                    slots_GR[:, : self._num_slots], (0, padding + end % 2), value=PAD_SLOT_ID
                )
            found.update(zip(groups, slots_GR[:, :end].unbind(), strict=True))
        return found

    def states(self, block_table: torch.Tensor, slots: int = 1) -> torch.Tensor:
        """[Q, slots] the blocks of each request's state, in one group's block table.

        Args:
            slots: one for the state of the step's last token; with drafts one for each behind it, too.
        """
        first, flat = self._states, block_table.reshape(-1)
        assert first is not None, "of layers with states"
        if slots == 1:
            return flat.index_select(0, first)[:, None]
        return flat[first[:, None] + torch.arange(slots, dtype=first.dtype, device=first.device)]

    def last_keys(self, slots: torch.Tensor) -> DeviceLastKeys:
        """The variant's last keys, given all slots of its layer."""
        rows, gather = self._last
        return DeviceLastKeys(rows.there, gather.there, slots[self._last_slot :])

    def common_metadata(
        self, block_table: torch.Tensor, slots: torch.Tensor, keeps_states: bool = False
    ) -> CommonAttentionMetadata:
        """Attention metadata of this variant over one group's block table.

        Args:
            block_table: [requests of the batch, blocks]; of a group of states [Q, slots] or more, see :meth:`states`.
        """
        num_reqs = len(self.variant.requests)
        # Where every request has a row, as in decode, the table is taken as it is; runs may be as many
        # as requests and still not be theirs.
        whole = keeps_states or (self.last is None and num_reqs == len(block_table))
        return CommonAttentionMetadata(
            query_start_loc=self._starts.there,
            query_start_loc_cpu=self._starts.host,
            seq_lens=self.seq_lens,
            seq_lens_cpu_upper_bound=self._lengths.host,
            num_reqs=num_reqs,
            num_actual_tokens=self.variant.num_rows,
            max_query_len=self._max_query_len,
            max_seq_len=self._max_seq_len,
            block_table_tensor=block_table if whole else block_table.index_select(0, self.requests),
            slot_mapping=slots if self.last is None else slots[: self.variant.num_rows],
            mm_req_doc_ranges=as_vllm(self.variant.mutual),
            is_prefilling=self._begins if keeps_states else None,
        )
