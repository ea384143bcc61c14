"""A request takes the blocks its layers need: none for image tokens in groups that lie wholly past the cliff."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1 import kv_cache_spec_registry as registry
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MambaSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.engine import v2_cpu
from tests.engine.cases import LONG, MISTRAL, Ask, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE
from tests.engine.tiny_llava import Shape
from vllm_flow.engine import groups
from vllm_flow.engine.core import storage
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings


def blocks_expected(
    shape: Shape, ask: Ask, prompt_tokens: int, group_layers: int
) -> tuple[int, ...]:
    """Blocks per group; the last output token is never stored."""
    stored = prompt_tokens + ask.max_tokens - 1
    cliff = shape.layers if ask.cliff is None else ask.cliff
    image = shape.image_tokens * len(ask.images)
    return tuple(
        -(-(stored - (image if first >= cliff else 0)) // BLOCK_SIZE)
        for first in range(0, shape.layers, group_layers)
    )


@pytest.mark.parametrize(
    "shape, group_layers",
    v2_cpu.reduced([(LONG, 1), (LONG, 2), (LONG, 6), (MISTRAL, 4)], to=[(LONG, 2)]),
    ids=str,
)
def test_blocks_hold_what_the_layers_see(
    open_engine: OpenEngine, shape: Shape, group_layers: int
) -> None:
    from vllm_flow.engine.inspect import footprints

    # Asynchronous scheduling may hold one token more than it needs when a request ends.
    engine = open_engine(shape, group_layers, async_scheduling=False)
    asks = [one_image(91, cliff) for cliff in (None, *range(shape.layers + 1))]
    asks += [two_images(92, 3), text_only(94, 3), text_only(95)]
    for index, ask in enumerate(asks):
        engine.add(f"blocks{index}", ask)
    outputs = engine.drain()
    found = {
        name.rsplit("-", 1)[0]: footprint for name, footprint in footprints(engine.llm).items()
    }
    for index, ask in enumerate(asks):
        footprint = found[f"blocks{index}"]
        prompt_tokens = len(outputs[f"blocks{index}"].prompt_token_ids or ())
        assert footprint.prompt_tokens == prompt_tokens
        assert footprint.image_tokens == shape.image_tokens * len(ask.images)
        assert footprint.blocks == blocks_expected(shape, ask, prompt_tokens, group_layers), ask


def test_blocks_that_are_not_allocated_serve_others(open_engine: OpenEngine) -> None:
    """A pool that makes baseline requests preempt each other holds as many that evict."""
    engine = open_engine(LONG, 2, kv_cache_memory_bytes=2 << 20)
    asks = [one_image(97 + i % 2, None) for i in range(8)]
    with engine.count_preemptions() as preempted:
        engine.run(asks)
    assert preempted, "the pool is too large for this test"
    with engine.count_preemptions() as preempted:
        engine.run([replace(ask, cliff=0) for ask in asks])
    assert not preempted


def test_a_spec_is_registered_where_it_is_made_and_where_it_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by an import: a worker makes the specs, an engine core in another process groups them."""
    plain = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    settings = FlowSettings.read({"group_layers": 1}, EngineFacts(2))
    names = {f"model.layers.{layer}.attn": plain for layer in range(2)}
    monkeypatch.setattr(registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    specs = groups.group_specs(names, settings)
    assert managers(specs) == {storage.FlowAttentionManager}
    monkeypatch.setattr(registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    assert managers(specs) == {FullAttentionManager}, "an empty registry knows vLLM's own only"
    monkeypatch.setattr(registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    arrived = pickle.loads(pickle.dumps(specs))
    assert arrived == specs
    assert managers(arrived) == {storage.FlowAttentionManager}


def managers(specs: dict[str, groups.FlowAttentionSpec]) -> set[type]:
    return {KVCacheSpecRegistry.get_manager_class(spec) for spec in specs.values()}


def test_a_storage_group_is_as_quantised_as_its_layers() -> None:
    """Eight bits a number: blocks of half the bytes, and the mode that backends read."""
    plain = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    eight = replace(plain, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    settings = FlowSettings.read({"group_layers": 2}, EngineFacts(4))
    found = groups.group_specs({f"layers.{n}.attn": eight for n in range(4)}, settings)
    for name, spec in found.items():
        assert (spec.dtype, spec.kv_quant_mode) == (eight.dtype, eight.kv_quant_mode), name
        assert spec.page_size_bytes == eight.page_size_bytes == plain.page_size_bytes // 2
    one, other = found["layers.0.attn"], found["layers.1.attn"]
    assert type(one).merge([one, other]) == one
    with pytest.raises(AssertionError, match="do not share"):
        type(one).merge([one, replace(other, kv_quant_mode=KVQuantMode.NONE)])


def test_layers_whose_keys_differ_in_size_are_padded_to_one() -> None:
    """Gemma 4: as many tokens to a block in every layer, a storage group each."""
    shape = dict(block_size=16, dtype=torch.float32)
    wide = SlidingWindowSpec(sliding_window=64, num_kv_heads=4, head_size=32, **shape)
    narrow = FullAttentionSpec(num_kv_heads=1, head_size=64, **shape)
    names = [f"layers.{n}.attn" for n in range(4)]
    specs = dict(zip(names, [wide, narrow] * 2, strict=True))
    found = groups.group_specs(specs, FlowSettings.read({"group_layers": 1}, EngineFacts(4)))
    for name, spec in found.items():
        assert spec.page_size_bytes == wide.page_size_bytes, name
        assert spec.block_size == 16
        assert spec.unpadded_page_size_bytes == specs[name].page_size_bytes, name
    with pytest.raises(ValueError, match=r"'layers\.1\.attn' differ .*\['group_layers'\] to 1"):
        groups.group_specs(specs, FlowSettings.read({"group_layers": 2}, EngineFacts(4)))


def test_a_model_whose_keys_differ_in_size_has_a_storage_group_per_layer() -> None:
    def settings(options: dict[str, int], kv_heads: list[int], **text: Any) -> FlowSettings:
        shape = [SimpleNamespace(head_size=64, total_num_kv_heads=heads) for heads in kv_heads]
        model = SimpleNamespace(
            served_model_name="model",
            model_arch_config=shape,
            get_total_num_hidden_layers=lambda: len(shape),
            is_mm_prefix_lm=False,
            multimodal_config=None,
            is_hybrid=False,
            hf_text_config=SimpleNamespace(**text),
        )
        return FlowSettings.read(options, EngineFacts.of_model(model))

    found = [
        settings({}, [2] * 16),
        settings({}, [2, 4] * 8),
        settings({"group_layers": 4}, [2, 4] * 8),
    ]
    assert [each.group_layers for each in found] == [2, 1, 4]
    # MiMo-V2: what layers with a window store, only its own keys say.
    in_windows = dict(hybrid_layer_pattern=[0, 1] * 8, swa_head_dim=64)
    for heads, group_layers in ((2, 2), (4, 1)):
        mimo = settings({}, [2] * 16, swa_num_key_value_heads=heads, **in_windows)
        assert mimo.group_layers == group_layers


def test_layers_with_a_window_or_chunks_share_a_storage_group_with_those_without() -> None:
    """Stored whole: the window is the attention's own affair, and counts what is stored."""
    shape = dict(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    windowed = SlidingWindowSpec(sliding_window=64, **shape)
    settings = FlowSettings.read({"group_layers": 2}, EngineFacts(4))
    names = [f"layers.{n}.attn" for n in range(4)]
    mixed = dict.fromkeys(names, windowed) | {names[1]: FullAttentionSpec(**shape)}
    found = groups.group_specs(mixed, settings)
    assert found == groups.group_specs(dict.fromkeys(names, FullAttentionSpec(**shape)), settings)
    local = ChunkedLocalAttentionSpec(attention_chunk_size=64, **shape)
    assert groups.group_specs(mixed | {names[2]: local}, settings) == found
    sinks = SinkFullAttentionSpec(sink_len=4, **shape)
    with pytest.raises(ValueError, match=r"'layers\.2\.attn' stores SinkFullAttentionSpec; serve"):
        groups.group_specs(mixed | {names[2]: sinks}, settings)


def test_states_stay_vllms_and_are_kept_between_steps_alone() -> None:
    """Mamba 2 also keeps one from within a step, of a place in the prompt that rows past a cliff do not tell."""
    shape = dict(block_size=16, shapes=((8,),), dtypes=(torch.float32,))
    plain = MambaSpec(**shape, mamba_type=MambaAttentionBackendEnum.SHORT_CONV)
    within = MambaSpec(**shape, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)
    specs = {"layers.0.conv": plain, "layers.1.mixer": within}
    found = groups.group_specs(specs, FlowSettings.read({"group_layers": 1}, EngineFacts(2)))
    assert found["layers.0.conv"] == plain
    assert found["layers.1.mixer"] == replace(within, num_prefill_checkpoint_blocks=0)
    other = replace(plain, mamba_type=MambaAttentionBackendEnum.MAMBA1)
    with pytest.raises(ValueError, match=r"'layers\.0\.conv' stores MambaSpec; serve"):
        groups.group_specs(specs | {"layers.0.conv": other}, FlowSettings.read({}, EngineFacts(2)))
