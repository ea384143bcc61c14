"""Where metadata of a variant begin in memory, whatever rows are left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.engine.worker.aligned import packed, unpacked
from vllm_flow.engine.worker.variant_tensors import VariantTensors
from vllm_flow.last_layer import LastLayer, spare_last_layers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans
from vllm_flow.step import ScheduledRequest

CPU, SIZE, WIDTH, GROUPS = torch.device("cpu"), 8, 8, 3


@st.composite
def requests(draw: st.DrawFn) -> list[ScheduledRequest]:
    """Chunks of requests with an image each, or none, that leaves at some layer."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        computed, rows = draw(st.integers(0, 30)), draw(st.integers(1, 30))
        first, length = draw(st.integers(0, 40)), draw(st.integers(1, 20))
        policy = FlowPolicy.withdrawal(draw(st.integers(1, 3))) if draw(st.booleans()) else None
        layout = TokenLayout.of(policy, ImageSpans.from_ranges([(first, first + length)]))
        found.append(ScheduledRequest(computed, rows, layout))
    return found


@settings(max_examples=150, deadline=None)
@given(requests(), st.integers(0, 5), st.booleans())
def test_every_pointer_of_a_variant_is_a_multiple_of_16_bytes(
    batch: list[ScheduledRequest], padding: int, late: bool
) -> None:
    """With lengths that only the device knows, too; and slots are those of the plan."""
    plan = plan_step(batch)
    if plan is None:
        return
    plan = spare_last_layers(plan, batch)
    shape = (SIZE, WIDTH)
    tables = [torch.randperm(99, dtype=torch.int32)[: 4 * WIDTH].view(4, -1) for _ in range(GROUPS)]
    for variant in plan.variants:
        last = variant.last if isinstance(variant, LastLayer) else None
        behind = torch.zeros(len(batch), dtype=torch.int64) if late else None
        groups = {shape: range(GROUPS)}
        tensors = VariantTensors(variant, groups, CPU, plan.seq_lens, None, behind)
        if not tensors.writes:
            continue
        more = 0 if last else padding
        slots = tensors.slots(tables, more)
        assert [*slots] == [*range(GROUPS)]
        for group, own in slots.items():
            common = tensors.common_metadata(tables[group], own)
            pointers = [common.query_start_loc, common.seq_lens, common.slot_mapping]
            expected = slots_of(tables[group], variant.row_requests, variant.positions)
            if last:
                keys = tensors.last_keys(own).slots
                pointers.append(keys)
                assert keys.tolist() == slots_of(tables[group], last.row_requests, last.positions)
            assert common.slot_mapping.tolist() == expected + [-1] * more
            assert [tensor.data_ptr() % 16 for tensor in pointers if len(tensor)] == [0] * sum(
                len(tensor) > 0 for tensor in pointers
            )
            assert common.query_start_loc.tolist() == variant.query_start_loc.tolist()
            assert common.seq_lens.tolist() == variant.seq_lens.tolist()


def slots_of(table: torch.Tensor, owners: np.ndarray, positions: np.ndarray) -> list[int]:
    return [
        int(table[owner, place // SIZE]) * SIZE + int(place) % SIZE
        for owner, place in zip(owners, positions, strict=True)
    ]


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4, 5], [0, 7], [8]], ids=str)
def test_parts_come_out_as_they_went_in(sizes: list[int]) -> None:
    parts = [np.arange(size, dtype=np.int64) + 10 * size for size in sizes]
    flat, steps = packed(parts)
    found = unpacked(torch.from_numpy(flat), steps)
    assert [part.tolist() for part in found] == [part.tolist() for part in parts]
    assert [(part.data_ptr() - flat.ctypes.data) % 16 for part in found if len(part)] == [
        0 for size in sizes if size
    ]
