"""One variant of a step on the device: its integers, sent in one copy, and what is read off them.

Knows vLLM's ``CommonAttentionMetadata``, and neither layers nor backends: what a step is made of, `metadata` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_flow.engine.device_step import DeviceLastKeys
from vllm_flow.engine.mutual_attention import as_vllm
from vllm_flow.engine.sending import copied, snapshot
from vllm_flow.last_layer import LastLayer
from vllm_flow.spans import IntArray
from vllm_flow.step import Variant

Shape: TypeAlias = tuple[int, int]
"""Of a block table: tokens per block, blocks per row."""


class VariantTensors:
    """One variant's integers on the device, sent in a single copy. R rows of Q requests.

    Args:
        variant: what the plan says.
        tables: shapes of the block tables that its layers use.
        device: where the model runs.
        of_states: shape of the tables of states, None where its layers have none.
        seq_lens: [N] tokens of each request of the batch after the step, by which its state is found.
        rejected_tokens: see :meth:`vllm_flow.engine.step_inputs.Lengths.rejected_tokens`.
    """

    def __init__(
        self,
        variant: Variant,
        tables: Iterable[Shape],
        device: torch.device,
        of_states: Shape | None = None,
        seq_lens: IntArray | None = None,
        rejected_tokens: torch.Tensor | None = None,
    ) -> None:
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
        if rejected_tokens is not None:
            parts |= {"row requests": row_requests, "positions": positions}
            parts.setdefault("requests", variant.requests)
            tables = ()
        for size, width in tables:
            # Where a row's block stands in the flattened table, and its slot inside the block.
            parts[f"place {size} {width}"] = row_requests * width + positions // size
            parts[f"inside {size} {width}"] = positions % size
        if of_states is not None and seq_lens is not None:
            # The last block that a request has by the end of the step, whatever of it left.
            size, width = of_states
            lengths = seq_lens[variant.requests]
            known = {"states": variant.requests * width + (lengths - 1) // size}
            parts |= known if rejected_tokens is None else {"lengths": lengths}
        sizes = [len(part) for part in parts.values()]
        host = snapshot(
            torch.from_numpy(
                np.concatenate(list(parts.values()), dtype=np.int32, casting="unsafe")
            ),
            device,
        )
        there = copied(host, device)
        self._max_query_len, self._max_seq_len = variant.max_query_len, variant.max_seq_len
        self._on_host = dict(zip(parts, host.split(sizes), strict=True))
        self._on_device = dict(zip(parts, there.split(sizes), strict=True))
        if rejected_tokens is not None:
            self._correct(rejected_tokens, of_states)

    def _correct(self, rejected_tokens: torch.Tensor, of_states: Shape | None) -> None:
        """Positions and lengths as the device knows them; lengths on the host stay upper bounds."""
        there = self._on_device
        of_requests = rejected_tokens[there["requests"]].to(torch.int32)
        there["seq_lens"] = there["seq_lens"] - of_requests
        if "lengths" in there and of_states is not None:
            size, width = of_states
            last = (there["lengths"] - of_requests - 1) // size
            there["states"] = there["requests"] * width + last
        there["positions"] = there["positions"] - rejected_tokens[there["row requests"]].to(
            torch.int32
        )

    def get(self, name: str) -> torch.Tensor | None:
        """``rows`` or ``gather`` on the device; None where the variant has none."""
        return self._on_device.get(name)

    @property
    def _begins(self) -> torch.Tensor:
        """[Q] whether the layers see a request's first rows, on the host."""
        starts, lengths = self._on_host["query_start_loc"], self._on_host["seq_lens"]
        return starts.diff() >= lengths

    def slots(
        self,
        block_tables: Sequence[torch.Tensor],
        tables: Mapping[Shape, Sequence[int]],
        padding: int = 0,
    ) -> dict[int, torch.Tensor]:
        """KV-cache group -> [R + padding] slots, of a last layer [R + D], its last keys' behind.

        One set of operations for tables of one shape.
        """
        found: dict[int, torch.Tensor] = {}
        for (size, width), groups in tables.items():
            place, inside = self._places(size, width)
            blocks_GR = torch.stack(
                [block_tables[g].reshape(-1).index_select(0, place) for g in groups]
            )
            slots_GR = blocks_GR.to(torch.int64) * size + inside
            if padding:
                slots_GR = nn.functional.pad(slots_GR, (0, padding), value=PAD_SLOT_ID)
            found.update(zip(groups, slots_GR.unbind(), strict=True))
        return found

    def _places(self, size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row's block stands in a flattened table, and its slot inside the block."""
        there = self._on_device
        if f"place {size} {width}" in there:
            return there[f"place {size} {width}"], there[f"inside {size} {width}"]
        positions = there["positions"]
        return there["row requests"] * width + positions // size, positions % size

    @property
    def requests(self) -> torch.Tensor:
        """[Q] batch indices of the variant's requests, on the device."""
        return self._on_device["requests"]

    def states(self, block_table: torch.Tensor, slots: int = 1) -> torch.Tensor:
        """[Q, slots] the blocks of each request's state, in one group's block table.

        Args:
            slots: one for the state of the step's last token; with drafts one for each behind it, too.
        """
        first, flat = self._on_device["states"], block_table.reshape(-1)
        if slots == 1:
            return flat.index_select(0, first)[:, None]
        return flat[first[:, None] + torch.arange(slots, dtype=first.dtype, device=first.device)]

    def last_keys(self, slots: torch.Tensor) -> DeviceLastKeys:
        """The variant's last keys, given all slots of its layer."""
        there = self._on_device
        return DeviceLastKeys(
            there["last rows"], there["last gather"], slots[self.variant.num_rows :]
        )

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
            is_prefilling=self._begins if keeps_states else None,
        )
