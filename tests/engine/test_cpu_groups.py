"""What storage groups of a CPU's step share is made once, and is what vLLM makes for each of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.block_table import MultiGroupBlockTable, SlotMappingMode

from tests.engine.cases import GQA, Ask, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, Engine, assert_exact
from tests.engine.test_last_layer import runner_of
from vllm_flow.engine.worker import cpu_groups
from vllm_flow.engine.worker.runner_v1 import FlowRunnerV1


def builds_of(engine: Engine, asks: list[Ask], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Per step: [builds, the layers' metadata]."""
    steps: list[Any] = []
    runner, build = runner_of(engine), CPUAttentionMetadataBuilder.build
    step = runner._build_attention_metadata

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps[-1][0] += 1
        return build(*args, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        steps.append([0, {}])
        found = step(*args, **kwargs)
        steps[-1][1] = found[0]
        return found

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", counted)
    monkeypatch.setattr(runner, "_build_attention_metadata", watched)
    assert_exact(engine, asks, engine.run(asks))
    return steps


def test_schedules_are_built_once_for_all_groups(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests that evict, once more for each set of rows that is left."""
    engine = open_engine(GQA, 1)
    assert len(engine.scheduler.kv_cache_config.kv_cache_groups) == GQA.layers
    for ask, builds, kinds in ((one_image(1), 1, 1), (one_image(1, 2), 3, 2)):
        with monkeypatch.context() as patch:
            steps = builds_of(engine, [ask], patch)
        assert steps[0][0] == builds, "the layers that see the image, its last, and those past it"
        for count, layers in steps[1:]:
            assert count == kinds
            schedules = {id(one.scheduler_metadata) for one in layers.values()}
            tables = {one.block_table.data_ptr() for one in layers.values()}
            slots = {one.slot_mapping.data_ptr() for one in layers.values()}
            assert (len(schedules), len(tables), len(slots)) == (kinds, GQA.layers, GQA.layers)


def test_what_is_built_once_is_what_vllm_builds_for_each_group(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field by field, in steps of several requests, some of which evict."""
    engine = open_engine(GQA, 1)
    runner, asks = runner_of(engine), [one_image(1), one_image(2, 1), one_image(3)]
    step, shared = runner._build_attention_metadata, runner.flow_shared_build
    assert len(shared.seen) == 1
    compared: set[int] = set()

    def twice(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(runner, "flow_shared_build", None)
            each = step(*args, **kwargs)[0]
        found = step(*args, **kwargs)
        assert found[0].keys() == each.keys()
        for name, metadata in found[0].items():
            mine, theirs = dict(vars(metadata)), dict(vars(each[name]))
            # The schedule holds addresses of its own.
            assert mine.pop("scheduler_metadata").shape == theirs.pop("scheduler_metadata").shape
            assert_close(mine, theirs, rtol=0, atol=0)
            compared.add(mine["block_table"].data_ptr())
        return found

    monkeypatch.setattr(runner, "_build_attention_metadata", twice)
    assert_exact(engine, asks, engine.run(asks))
    assert len(compared) == GQA.layers


@pytest.mark.parametrize(("drafts", "seen"), [(False, 1), (True, GQA.layers)])
def test_a_drafter_finds_its_group_among_those_that_are_built(
    open_engine: OpenEngine, drafts: bool, seen: int
) -> None:
    runner = runner_of(open_engine(GQA, 1))
    builders = [groups[0].get_metadata_builder(0) for groups in runner.attn_groups]
    tables = runner.input_batch.block_table.block_tables
    found = cpu_groups.shared_build(runner.kv_cache_config, builders, tables, drafts)
    assert [one.layer_names for one in found.seen] == [
        one.layer_names for one in runner.kv_cache_config.kv_cache_groups[:seen]
    ]


def test_slots_are_those_of_vllm(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 1)
    tables = runner_of(engine).input_batch.block_table
    generator = torch.Generator().manual_seed(1)
    for table in tables.block_tables:
        ids = torch.randint(0, 99, table.block_table.cpu.shape, generator=generator)
        table.block_table.cpu.copy_(ids)
    starts = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 70, 31, 32, 33, 34, 35])
    found = []
    for compute in (MultiGroupBlockTable.compute_slot_mapping, type(tables).compute_slot_mapping):
        compute(tables, 3, starts, positions)
        found.append([table.slot_mapping.gpu[:9].clone() for table in tables.block_tables])
    tables.clear()
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))
    assert len({tuple(slots.tolist()) for slots in found[0]}) == GQA.layers, "tables differ"


def test_views_of_slots_are_those_of_vllm(open_engine: OpenEngine) -> None:
    """The same ones in steps of the same size, and vLLM's own where rows are padding."""
    engine = open_engine(GQA, 1)
    runner = runner_of(engine)
    vllms = super(FlowRunnerV1, runner)._get_slot_mappings
    for tokens in (1, 4, 65, 4):
        assert_close(runner._get_slot_mappings(tokens, 1, tokens), vllms(tokens, 1, tokens))
    first, second = (runner._get_slot_mappings(4, 4, 4) for _ in range(2))
    assert len(first[0]) == len(first[1]) == GQA.layers
    for mine, again in zip(first, second, strict=True):
        assert mine is not again, "whoever gets them may change them"
        assert all(again[key] is view for key, view in mine.items())
    slots = runner.input_batch.block_table[1].slot_mapping.gpu
    slots[:5] = 7
    assert first[0][1].tolist() == [7] * 4
    assert runner._get_slot_mappings(5, 5, 4)[0][1].tolist() == [7, 7, 7, 7, -1]


def test_views_are_not_remembered_without_end() -> None:
    made: list[int] = []

    def make(number: int) -> list[int]:
        made.append(number)
        return [number]

    remembered = cpu_groups.Remembered(make)
    most = cpu_groups.Remembered.AT_MOST
    for _ in range(2):
        assert [remembered[number] for number in range(most)] == [[n] for n in range(most)]
    assert made == list(range(most))
    assert remembered[most] == [most]
    assert list(remembered) == [most]


def test_groups_of_other_shapes_are_computed_apart_and_states_not_at_all() -> None:
    """A table of states is as narrow as their blocks are few: no token's position is looked up there."""
    with_slots = SlotMappingMode.TOKEN_TO_KV_SLOT
    modes = [with_slots, with_slots, SlotMappingMode.NONE, with_slots]
    device = torch.device("cpu")
    tables = MultiGroupBlockTable(
        4, 99, False, device, [16, 16, 16, 64], [8, 8, 1, 2], slot_mapping_modes=modes
    )
    tables.add_row(([5, 6], [7, 8], [9], [3]), 1)
    cpu_groups.stack(tables)
    tables.add_row(([1, 2], [3, 4], [2], [1]), 0)
    tables.compute_slot_mapping(
        2, torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([17, 15, 16])
    )
    slots = [table.slot_mapping.gpu[:3].tolist() for table in tables.block_tables]
    assert slots[0] == [2 * 16 + 1, 5 * 16 + 15, 6 * 16]
    assert slots[1] == [4 * 16 + 1, 7 * 16 + 15, 8 * 16]
    assert slots[2] == [0, 0, 0]
    assert slots[3] == [1 * 64 + 17, 3 * 64 + 15, 3 * 64 + 16]
    assert tables[2].get_device_tensor(2).tolist() == [[2], [9]]


def test_nothing_is_shared_among_layers_that_differ(open_engine: OpenEngine) -> None:
    """Such as layers with windows of their own."""
    runner = runner_of(open_engine(GQA, STOCK))
    (group,) = runner.attn_groups[0]
    one = group.get_metadata_builder(0)
    other = object.__new__(type(one))
    vars(other).update(vars(one), window_size=one.window_size + 7)
    groups = [
        [SimpleNamespace(get_metadata_builder=lambda _, builder=builder: builder)]
        for builder in (one, other)
    ]
    tables = object.__new__(MultiGroupBlockTable)
    tables.block_tables = []
    stand_in = SimpleNamespace(
        device=torch.device("cpu"),
        attn_groups=groups,
        input_batch=SimpleNamespace(block_table=tables),
    )
    assert cpu_groups.share(stand_in) is None
    assert not one.supports_update_block_table
    assert isinstance(tables, cpu_groups.StackedTables)
