"""Latent attention: what is stored is read, moved and asked like keys, and each variant plans its own prefill."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vllm.config import ParallelConfig
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadataBuilder,
)
from vllm.model_executor.models.deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2Model
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from vllm_flow.engine import groups
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.families import Decoder
from vllm_flow.engine.families.finding import SCALED, residual_decoder
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.worker.attention.keys import key_reader
from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
from vllm_flow.engine.worker.latent import PrefillPlans, cache_of, queries_of, store
from vllm_flow.engine.worker.passes.calls import lengthened
from vllm_flow.engine.worker.passes.decoder import DecoderHook
from vllm_flow.engine.worker.slots import token_places

LATENT, TURNED, BLOCKS, SLOTS = 8, 4, 5, 16


def layer_of(heads: int = 2, own: int = 3) -> Any:
    """As much of vLLM's ``MLAAttention`` as is read, on the CPU backend's own writer."""
    return SimpleNamespace(
        layer_name="model.layers.0.self_attn.attn",
        attn_backend=SimpleNamespace(get_name=lambda: "CPU_MLA"),
        impl=SimpleNamespace(
            do_kv_cache_update=lambda *args: CPUMLAImpl.do_kv_cache_update(None, *args)  # type: ignore[arg-type]
        ),
        kv_cache=torch.zeros(BLOCKS, SLOTS, LATENT + TURNED),
        kv_cache_dtype="auto",
        _k_scale=torch.ones(()),
        kv_lora_rank=LATENT,
        qk_nope_head_dim=own,
        num_heads=heads,
        num_kv_heads=1,
        head_size=LATENT + TURNED,
        W_UK_T=torch.randn(heads, own, LATENT),
    )


def test_the_vectors_are_found_where_the_backend_wrote_them() -> None:
    layer = layer_of()
    read, places = key_reader(layer), token_places(layer)
    assert not layer.kv_cache.any(), "the block that was tried must be as it was"
    vectors = torch.randn(BLOCKS * SLOTS, 1, LATENT + TURNED)
    store(layer, vectors, vectors, torch.arange(BLOCKS * SLOTS))
    blocks = torch.tensor([3, 0, 3])
    found = read(cache_of(layer), blocks, layer.head_size)
    assert torch.equal(found[:, 0], vectors[:, 0].unflatten(0, (BLOCKS, SLOTS))[blocks])
    source, target = torch.tensor([70, 3, 20]), torch.tensor([1, 20, 79])
    places.put(cache_of(layer), target, places.take(cache_of(layer), source))
    assert torch.equal(layer.kv_cache.flatten(0, 1)[target], vectors[source, 0])


def test_eight_bits_and_more_than_a_vector_are_not_moved() -> None:
    layer = layer_of()
    layer.kv_cache = layer.kv_cache.to(torch.uint8)
    with pytest.raises(ValueError, match="stored as torch.uint8"):
        token_places(layer)
    layer.kv_cache = torch.zeros(BLOCKS, SLOTS, LATENT + TURNED + 1)
    with pytest.raises(ValueError, match="more than a latent vector per token"):
        token_places(layer)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_a_query_of_vectors_gives_the_logits_of_keys(
    heads: int, own: int, rows: int, seed: int
) -> None:
    """A head's key is what its matrix makes of the latent part, and the other part as it is."""
    torch.manual_seed(seed)
    layer = layer_of(heads, own)
    query = torch.randn(rows, heads, own + TURNED)
    vectors = torch.randn(7, LATENT + TURNED)
    keys = torch.einsum("hdl,tl->thd", layer.W_UK_T, vectors[:, :LATENT])
    turned = vectors[:, None, LATENT:].expand(-1, heads, -1)
    expected = torch.einsum("qhd,thd->qht", query, torch.cat([keys, turned], -1))
    found = queries_of(layer, query) @ vectors.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_layers_are_asked_as_they_were() -> None:
    layer = SimpleNamespace(head_size=4, kv_cache=torch.zeros(2, 3, 16, 8))
    query = torch.randn(5, 24)
    assert torch.equal(queries_of(layer, query), query.view(5, 6, 4))
    assert cache_of(layer) is layer.kv_cache


class Backend:
    """A plan of a prefill, as vLLM's prefill backends keep it."""

    def clone(self) -> Backend:
        return Backend()


def test_each_variant_has_a_plan_of_its_own() -> None:
    builder, other, plans = SimpleNamespace(), SimpleNamespace(), PrefillPlans()
    for one in (builder, other):
        one._prefill_backend = Backend()
    stock = builder._prefill_backend
    seen = []
    for one, variant in ((builder, 0), (builder, 1), (other, 0), (builder, 0)):
        with plans.of(one, variant):
            seen.append(one._prefill_backend)
        assert builder._prefill_backend is stock
    assert seen[3] is seen[0], "planned anew in each step, not made anew"
    assert len({*map(id, seen), id(stock), id(other._prefill_backend)}) == 5
    with plans.of(SimpleNamespace(), 0):  # of a backend without plans
        pass


def test_vllm_still_keeps_one_plan_per_builder() -> None:
    """Once it does not, ours can go."""
    source = inspect.getsource(MLACommonMetadataBuilder)
    assert "self._prefill_backend = attention_layer.prefill_backend.clone()" in source
    assert "self._prefill_backend.prepare_metadata(prefill_metadata)" in source


def test_latent_layers_are_stored_by_group() -> None:
    plain = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
    names = [f"model.layers.{n}.self_attn.attn" for n in range(4)]
    found = groups.group_specs(
        dict.fromkeys(names, plain), FlowSettings.read({"group_layers": 2}, EngineFacts(4))
    )
    specs = [found[name] for name in names]
    assert {type(spec) for spec in specs} == {groups.FlowLatentSpec}
    assert [(spec.first_layer, spec.last_layer) for spec in specs] == [(0, 1)] * 2 + [(2, 3)] * 2
    assert {spec.page_size_bytes for spec in specs} == {plain.page_size_bytes}
    assert specs[0].merge(specs[:2]) == specs[0]
    with pytest.raises(AssertionError, match="do not share"):
        specs[0].merge(specs[1:3])
    assert specs[0].without_layers == specs[2].without_layers
    several = MLAAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32, tokens_per_state=4
    )
    with pytest.raises(ValueError, match="stores MLAAttentionSpec; serve this model without"):
        groups.group_specs(dict.fromkeys(names, several), FlowSettings.read({}, EngineFacts(4)))


class CountedLayer(nn.Module):
    """A layer of DeepSeek's, as it is called: adds its positions, and what its queries are scaled by."""

    def forward(
        self, positions: Any, hidden_states: Any, residual: Any, llama_4_scaling: Any
    ) -> Any:
        assert len(positions) == len(hidden_states)
        residual = hidden_states if residual is None else residual
        scaled = 0 if llama_4_scaling is None else llama_4_scaling[:, 0]
        return hidden_states + positions[:, None] + scaled, residual + 1


class CountedNorm(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        return hidden_states + residual, residual


class CountingModel(nn.Module):
    """Counts rows between its layers, as DeepSeek's does."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CountedLayer() for _ in range(layers))
        self.norm = CountedNorm()

    def forward(self, positions: Any, hidden: Any, scaling: Any) -> Any:
        residual = None
        for layer in self.layers:
            assert len(hidden) == len(positions), "taken for rows of other workers"
            hidden, residual = layer(positions, hidden, residual, scaling)
            assert len(residual) == len(positions)
        return self.norm(hidden, residual)[0]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_model_that_counts_rows_finds_all_of_them(data: Any) -> None:
    rows, layers = data.draw(st.integers(1, 6)), 4
    model = CountingModel(layers)
    hidden, positions = torch.randn(rows, 3), torch.arange(rows) * 10
    scaling = data.draw(st.sampled_from([None, torch.randn(rows, 1, 1)]))
    alive, variants = list(range(rows)), {}
    expected = model(positions, hidden, scaling)
    for first in sorted(data.draw(st.sets(st.integers(0, layers - 1), max_size=2))):
        gather = sorted(data.draw(st.sets(st.integers(0, len(alive) - 1)))) if alive else []
        alive = [alive[row] for row in gather]
        variants[first] = DeviceVariant(
            len(alive),
            torch.tensor(alive, dtype=torch.int64),
            torch.tensor(gather, dtype=torch.int64),
        )
    hook = DecoderHook(residual_decoder(SimpleNamespace(model=model)))
    assert hook.decoder.call == "scaled"
    with hook.installed(DeviceStep(variants=variants)):
        found = model(positions, hidden, scaling)
    assert found.shape == expected.shape
    assert torch.equal(found[alive], expected[alive])


def test_rows_in_front_are_those_that_there_were() -> None:
    rows = torch.randn(2, 3)
    assert lengthened(rows, 2) is rows
    longer = lengthened(rows, 5)
    assert longer.shape == (5, 3) and torch.equal(longer[:2], rows)


def test_deepseeks_decoder_still_counts_rows_and_is_called_so() -> None:
    """Once it does not, nothing need be lengthened."""
    source = inspect.getsource(DeepseekV2Model.forward)
    assert source.count("hidden_states.shape[0] != positions.shape[0]") == 2
    assert tuple(inspect.signature(DeepseekV2DecoderLayer.forward).parameters)[1:] == SCALED


def test_rows_are_spread_over_workers_beside_data_parallelism_alone() -> None:
    """Which is refused for models with experts."""
    for tensor, data in ((2, 1), (1, 1), (2, 2)):
        config = ParallelConfig(
            tensor_parallel_size=tensor, data_parallel_size=data, enable_expert_parallel=True
        )
        assert config.use_sequence_parallel_moe == (data > 1)


def test_the_usual_layers_are_called_as_before() -> None:
    class Usual(nn.Module):
        def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
            return hidden_states, residual

    model = SimpleNamespace(layers=nn.ModuleList([Usual()]), norm=CountedNorm())
    found: Decoder = residual_decoder(SimpleNamespace(model=model))
    assert found.call == "residual"
