"""A variant has a builder of its own where a backend's keeps one plan, and vLLM's where it does not."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.v1.worker.utils import AttentionGroup

from vllm_flow.engine.worker import group_memory, variant_builders
from vllm_flow.engine.worker.decode_graphs import unreplayable
from vllm_flow.engine.worker.variant_builders import VariantBuilders, another, settle

CONFIG = SimpleNamespace(compilation_config=SimpleNamespace(custom_ops=[]))
SCRATCH, KEPT = 1000, 64


class Builder:
    """A builder as FlashInfer's; it asks for the configuration as it is made."""

    requires_block_table_width = False

    def __init__(self, spec: Any, layer_names: list[str], config: Any, device: Any) -> None:
        self.made_with = (spec, tuple(layer_names), config, device)
        assert get_current_vllm_config() is config
        self.vllm_config, self.device = config, device
        self.enable_cuda_graph, self.use_trtllm_decode_attention = True, False
        self.pages = torch.zeros(KEPT, dtype=torch.uint8, device="meta")
        self._workspace_buffer: Any = None

    def _get_workspace_buffer(self) -> Any:
        if self._workspace_buffer is None:
            self._workspace_buffer = torch.zeros(SCRATCH, dtype=torch.uint8, device="meta")
        return self._workspace_buffer

    def set_workspace_buffer(self, buffer: Any) -> None:
        self._workspace_buffer = buffer


class Without(Builder):
    """Of a backend that shares nothing."""

    _get_workspace_buffer = set_workspace_buffer = property()  # type: ignore[assignment]


class Composed(Builder):
    """Of a backend of which FlashInfer is a part."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        del self.enable_cuda_graph, self.use_trtllm_decode_attention
        self._builders = (Without(*args), Builder(*args))


def group(name: str, made: type[Builder] = Builder, layers: int = 3) -> AttentionGroup:
    backend = type(
        "Backend",
        (),
        {
            "get_name": staticmethod(lambda: name),
            "get_builder_cls": staticmethod(lambda: made),
        },
    )
    found = AttentionGroup(backend, [f"layers.{i}" for i in range(layers)], "spec", 0)
    with set_current_vllm_config(CONFIG):
        found.create_metadata_builders(CONFIG, torch.device("cpu"))
    return found


def builder_of(attn_group: AttentionGroup) -> Any:
    return attn_group.get_metadata_builder(0)


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN"])
def test_a_backend_that_keeps_nothing_has_vllms_own(name: str) -> None:
    stock, builders = group(name), VariantBuilders()
    assert builders.of(stock, 0) is stock and builders.of(stock, 1) is stock


@pytest.mark.parametrize(
    ("name", "made"), [("FLASHINFER", Builder), ("TRITON_FLASHINFER", Composed)]
)
def test_each_variant_of_a_group_has_one_and_keeps_it(name: str, made: type[Builder]) -> None:
    stocks, builders = [group(name, made), group(name, made)], VariantBuilders()
    own = [builders.of(stock, number) for stock in stocks for number in range(3)]
    again = [builders.of(stock, number) for stock in stocks for number in range(3)]
    assert all(one is other for one, other in zip(own, again, strict=True))
    every = [builder_of(found) for found in (*own, *stocks)]
    assert len(set(map(id, every))) == 8, "six beside vLLM's two"
    for stock, found in zip(stocks * 3, own[::3] + own[1::3] + own[2::3], strict=True):
        assert builder_of(found).made_with == builder_of(stock).made_with
        assert found.layer_names == stock.layer_names
        scratch = builder_of(stock)._get_workspace_buffer()
        assert builder_of(found)._get_workspace_buffer() is scratch


def test_groups_share_scratch() -> None:
    """Where Model Runner V1 has given each its own; others are left alone."""
    groups = [[group("FLASHINFER")], [], [group("FLASHINFER"), group("TRITON_ATTN")]]
    settle(groups, full_graphs=True)
    first, second = (builder_of(found) for found in (groups[0][0], groups[2][0]))
    assert first._workspace_buffer is second._workspace_buffer is not None
    assert builder_of(groups[2][1])._workspace_buffer is None
    one, other = group("FLASHINFER"), group("FLASHINFER")
    settle([[group("FLASHINFER", Without), one], [other]], full_graphs=True)
    assert builder_of(one)._workspace_buffer is builder_of(other)._workspace_buffer is not None


@pytest.mark.parametrize("made", [Builder, Composed])
@pytest.mark.parametrize("differ", [True, False])
def test_layers_that_no_plan_has_together_are_groups_of_their_own(
    differ: bool, made: type[Builder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window, scale and cap to a plan, as FlashInfer's builders say of their layers; other backends' may differ."""
    read = ("layers.0", "layers.1", "layers.2", "layers.3")
    layers = {
        name: SimpleNamespace(window_left=w, logits_soft_cap=None, sm_scale=s, has_sinks=False)
        for name, w, s in zip(read, (5, -1, 5, 5), (1, 1, 1, 2), strict=True)
    }
    implementation = SimpleNamespace(FlashInferImpl=object())
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.flashinfer", implementation)

    def told(*asked: Any) -> Any:
        assert asked == (CONFIG, [*read], implementation.FlashInferImpl)
        return layers

    monkeypatch.setattr(variant_builders, "get_per_layer_parameters", told)
    groups = [[group("FLASHINFER", made, 4)], [group("TRITON_ATTN", made, 4)]]
    for (found,) in groups:
        part = getattr(builder_of(found), "_builders", [builder_of(found)])[-1]
        part.global_hyperparameters = SimpleNamespace(has_same_all_params=not differ)
    was = [list(of_group) for of_group in groups]
    settle(groups, full_graphs=True)
    assert groups[1] == was[1]
    if not differ:
        assert groups[0] == was[0]
        return
    assert [found.layer_names for found in groups[0]] == [
        ["layers.0", "layers.2"],
        ["layers.1"],
        ["layers.3"],
    ]
    for found in groups[0]:
        (own,) = found.metadata_builders
        assert own.made_with == ("spec", tuple(found.layer_names), CONFIG, torch.device("cpu"))
        assert own._workspace_buffer is builder_of(groups[0][0])._workspace_buffer is not None


@pytest.mark.parametrize("full", [True, False])
def test_wrappers_for_graphs_go_with_the_graphs(full: bool) -> None:
    groups = [[group("FLASHINFER"), group("TRITON_FLASHINFER", Composed)]]
    settle(groups, full)
    assert builder_of(groups[0][0]).enable_cuda_graph is full
    assert builder_of(groups[0][1])._builders[1].enable_cuda_graph is full


@pytest.mark.parametrize(
    ("name", "made"), [("FLASHINFER", Builder), ("TRITON_FLASHINFER", Composed)]
)
def test_full_graphs_need_kernels_without_a_plan(name: str, made: type[Builder]) -> None:
    found = group(name, made)
    assert (unreplayable([[found]]) or "").startswith(f"{name} (with vLLM-Flow, it has full graphs")
    part = builder_of(found)._builders[1] if made is Composed else builder_of(found)
    part.use_trtllm_decode_attention = True
    assert unreplayable([[found]]) is None


def test_memory_is_counted_once_and_with_what_variants_may_take() -> None:
    groups = [[group("FLASHINFER", layers=2)], [group("FLASHINFER", layers=3)]]
    settle(groups, full_graphs=False)
    of_groups = group_memory.scratch_of(groups)
    assert of_groups == [SCRATCH + KEPT, KEPT]
    assert group_memory.scratch_of_variants(groups) == 5 * (KEPT + group_memory.PLANS)
    for found in (groups[0][0], groups[1][0]):  # as on Blackwell
        builder_of(found).flashinfer_trtllm_api_decode_kernel = SimpleNamespace(value="trtllm-gen")
    assert group_memory.scratch_of_variants(groups) == 5 * KEPT
    assert group_memory.scratch_of_variants([[group("FLASH_ATTN")]]) == 0


def test_another_is_one_of_the_same_class() -> None:
    stock = group("FLASHINFER")
    assert type(another(stock)) is AttentionGroup and another(stock).metadata_builders != []
