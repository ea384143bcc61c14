"""When storage groups share what a backend planned, and when they must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from vllm_flow.engine.groups import FlowAttentionSpec
from vllm_flow.engine.worker.metadata import _build
from vllm_flow.engine.worker.shared_metadata import sharing
from vllm_flow.engine.worker.step_inputs import DraftCounts
from vllm_flow.engine.worker.variant_tensors import VariantTensors
from vllm_flow.step import Variant


class Builder:
    """A metadata builder as far as the engine knows it; remembers what it was asked for."""

    def __init__(self, graphs: CUDAGraphMode, can_update: bool) -> None:
        self.supports_update_block_table = can_update
        self.vllm_config = self.compilation_config = self
        self.cudagraph_mode = graphs
        self.built: list[dict[str, Any]] = []

    def update_block_table(self, metadata: Any, table: Any, slots: Any) -> Any:
        return ("updated", metadata, table, slots)


class Group:
    """An attention group of one storage group."""

    kernel_block_size: int | None = None

    def __init__(self, builder: Builder, first_layer: int, block_size: int = 16) -> None:
        self.builder = builder
        self.kv_cache_spec = FlowAttentionSpec(
            block_size=block_size,
            num_kv_heads=2,
            head_size=32,
            dtype=torch.float32,
            first_layer=first_layer,
            last_layer=first_layer + 1,
        )

    def get_metadata_builder(self, ubatch: int) -> Builder:
        return self.builder

    def build_metadata(self, common: Any, ubatch: int = 0, **kwargs: Any) -> Any:
        self.builder.built.append(kwargs)
        return ("built", common)


class Common:
    def __init__(self, name: str) -> None:
        self.block_table_tensor, self.slot_mapping = f"{name} table", f"{name} slots"


def build_two(builder: Builder, *groups: Group) -> list[Any]:
    built: dict[Any, Any] = {}
    return [_build(group, Common(str(i)), built) for i, group in enumerate(groups)]


def test_a_second_storage_group_takes_the_first_ones_schedule() -> None:
    builder = Builder(CUDAGraphMode.NONE, can_update=True)
    first, second = build_two(builder, Group(builder, 0), Group(builder, 2))
    assert second == ("updated", first, "1 table", "1 slots")
    assert builder.built == [{}]


@pytest.mark.parametrize(
    ("graphs", "can_update", "block_size"),
    [(CUDAGraphMode.NONE, False, 16), (CUDAGraphMode.NONE, True, 32)],
    ids=["the backend cannot", "other blocks"],
)
def test_every_group_is_planned_where_they_differ(
    graphs: CUDAGraphMode, can_update: bool, block_size: int
) -> None:
    builder = Builder(graphs, can_update)
    answers = build_two(builder, Group(builder, 0), Group(builder, 2, block_size))
    assert [kind for kind, *_ in answers] == ["built", "built"]


def test_with_graphs_nothing_is_written_into_the_builders_own_schedule() -> None:
    """A builder keeps one schedule for its graphs; a variant of the same group would overwrite it."""
    builder = Builder(CUDAGraphMode.FULL_DECODE_ONLY, can_update=True)
    answers = build_two(builder, Group(builder, 0), Group(builder, 2))
    assert builder.built == [
        {"fast_build": True}
    ]  # without a schedule, so that the second group may have it
    assert [kind for kind, *_ in answers] == ["built", "updated"]


def test_a_step_without_variants_is_planned_once_for_groups_that_are_alike() -> None:
    """And in the schedule of the builder: it is the only one of the step."""
    builder = Builder(CUDAGraphMode.FULL_DECODE_ONLY, can_update=True)
    groups = [[Group(builder, 0)], [Group(builder, 2)], [Group(builder, 4, block_size=32)]]
    for _ in range(2):  # nothing goes from one step to the next
        builder.built.clear()
        shown = sharing(groups)
        answers = [group.build_metadata(Common(str(i)), 0) for i, (group,) in enumerate(shown)]
        assert [kind for kind, *_ in answers] == ["built", "updated", "built"]
        assert answers[1] == ("updated", answers[0], "1 table", "1 slots")
        assert builder.built == [{}, {}]
    assert [group.kv_cache_spec for (group,) in shown] == [g.kv_cache_spec for (g,) in groups]


def test_a_drafter_with_other_heads_is_planned_alone() -> None:
    """What a schedule is made for, though its keys are stored like the target's."""
    builders = [Builder(CUDAGraphMode.NONE, can_update=True) for _ in range(2)]
    for heads, builder in enumerate(builders, 8):
        builder.num_heads_q = heads
    shown = sharing([[Group(builder, 0) for builder in builders], [Group(builders[0], 2)]])
    answers = [group.build_metadata(Common("one")) for groups in shown for group in groups]
    assert [kind for kind, *_ in answers] == ["built", "built", "updated"]


@pytest.mark.parametrize("asked", [{"ubatch_idx": 1}, {"num_accepted_tokens": 3}], ids=str)
def test_what_is_not_of_the_whole_step_is_planned_alone(asked: dict[str, int]) -> None:
    builder = Builder(CUDAGraphMode.NONE, can_update=True)
    for (group,) in sharing([[Group(builder, 0)], [Group(builder, 2)]]):
        assert group.build_metadata(Common("one"), **asked)[0] == "built"


def of_two_in_three() -> Variant:
    """One row each of the second and the third request of a batch; the first one's all left."""
    ints = {
        "row_requests": [1, 2],
        "positions": [20, 31],
        "requests": [1, 2],
        "query_start_loc": [0, 1, 2],
        "seq_lens": [21, 32],
    }
    arrays: dict[str, Any] = {name: np.array(values) for name, values in ints.items()}
    return Variant(first_layer=3, rows=np.array([4, 5]), gather=np.array([4, 5]), **arrays)


CPU = torch.device("cpu")
TABLE = torch.arange(100, 130).reshape(3, 10)


@pytest.mark.parametrize(
    ("rejected", "first"),
    # Of blocks of 16 tokens, by what the requests have, those that left among it.
    [(None, (111, 123)), ((0, 0, 0), (111, 123)), ((9, 1, 1), (110, 122))],
)
def test_a_state_is_found_by_what_a_request_has_become(
    rejected: tuple[int, ...] | None, first: tuple[int, int]
) -> None:
    """Drafts that were rejected since the host planned may have reached into another block."""
    rejected_tokens = None if rejected is None else torch.tensor(rejected)
    tensors = VariantTensors(
        of_two_in_three(), {}, CPU, np.array([50, 17, 49]), (16, 10), rejected_tokens
    )
    for slots in (1, 4):
        found = [[start + slot for slot in range(slots)] for start in first]
        assert tensors.states(TABLE, slots).tolist() == found


def test_drafts_are_those_of_the_requests_that_are_left() -> None:
    tensors = VariantTensors(of_two_in_three(), {}, CPU, np.array([50, 17, 49]), (16, 10))
    counts = DraftCounts(torch.tensor([1, 3, 2]), torch.tensor([-1, 3, 0]))
    given = {name: value.tolist() for name, value in counts.builder_arguments(tensors).items()}
    assert given == {"num_accepted_tokens": [3, 2], "num_decode_draft_tokens_cpu": [3, 0]}
