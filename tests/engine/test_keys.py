"""Keys read back from every way of storing them, and the log-sum-exp over spans against softmax."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_flow.engine.worker.attention.keys import (
    column_major,
    key_reader,
    span_lse,
    span_mass,
    tiled_pairs,
    token_major,
)
from vllm_flow.engine.worker.caches import cached_layers

BLOCKS, HEADS, SLOTS, SIZE = 5, 2, 32, 64


def layer_writing(write: Any, cache: torch.Tensor, **impl: Any) -> Any:
    """What `key_reader` needs of an attention layer whose backend stores keys by `write`."""
    return SimpleNamespace(
        layer_name="model.layers.0.self_attn.attn",
        attn_backend=SimpleNamespace(get_name=lambda: "SOME_BACKEND"),
        impl=SimpleNamespace(do_kv_cache_update=write, **impl),
        kv_cache=cache,
        num_kv_heads=HEADS,
        head_size=SIZE,
        dtype=cache.dtype,
    )


def cpu_writer(isa: str) -> Any:
    """vLLM's own operator, with the views that its CPU backend makes."""

    def write(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        halves = cache.view(len(cache), HEADS, SLOTS * 2, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)

    return write


def slot_writer(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """Key and value side by side in the logical view, as CUDA's backends store them."""
    cache[slots // SLOTS, :, slots % SLOTS] = torch.cat([key, value], dim=-1)


def strided(
    layout: KVCacheLayout,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (BLOCKS, HEADS, SLOTS, 2 * SIZE),
) -> torch.Tensor:
    """An empty cache in logical order whose memory is in the layout's order."""
    order = layout.layer_view_order
    memory = torch.zeros([shape[dim] for dim in order], dtype=dtype)
    return memory.permute([order.index(dim) for dim in range(4)])


FLOAT, HALF = torch.float32, torch.bfloat16


WAYS = {
    "vec": (cpu_writer("vec"), strided(KVCacheLayout.LBHNC, FLOAT), column_major),
    "vec-16-bit": (cpu_writer("vec"), strided(KVCacheLayout.LBHNC, HALF), column_major),
    "vec16": (cpu_writer("vec16"), strided(KVCacheLayout.LBHNC, FLOAT), column_major),
    "amx": (cpu_writer("amx"), strided(KVCacheLayout.LBHNC, HALF), tiled_pairs),
    "HND": (slot_writer, strided(KVCacheLayout.LBHNC, HALF), token_major),
    "NHD": (slot_writer, strided(KVCacheLayout.LBNHC, HALF), token_major),
    "heads-first": (slot_writer, strided(KVCacheLayout.LHBNC, FLOAT), token_major),
}
"""Who writes, into which cache, and which reader finds the keys."""


@pytest.mark.parametrize(("write", "cache", "expected"), WAYS.values(), ids=WAYS)
def test_the_reader_finds_what_the_backend_wrote(write: Any, cache: Any, expected: Any) -> None:
    if current_platform.is_cpu():
        current_platform.import_kernels()
    cache = cache.clone(memory_format=torch.preserve_format)
    try:
        read = key_reader(layer_writing(write, cache))
    except RuntimeError as error:
        if "Unsupported CPU attention configuration" not in str(error):
            raise
        pytest.skip(f"vLLM has no such kernel for this processor: {error}")
    assert read is expected
    assert not cache.any(), "the block that was tried must be as it was"
    keys = torch.randn(BLOCKS * SLOTS, HEADS, SIZE).to(cache.dtype)
    layer = layer_writing(write, cache)
    write(layer, keys, -keys, cache, torch.randperm(len(keys), generator=torch.manual_seed(1)))
    slots = torch.randperm(len(keys), generator=torch.manual_seed(1)).argsort()
    blocks = torch.tensor([3, 0, 3])
    found = read(cache, blocks, SIZE)
    expected_keys = keys[slots].unflatten(0, (BLOCKS, SLOTS))[blocks]
    assert torch.equal(found.transpose(1, 2), expected_keys)


def test_values_may_be_narrower_than_keys() -> None:
    """MiMo-V2: a value as wide as a key would be written over the next slot's key."""
    cache = strided(KVCacheLayout.LBNHC, FLOAT, (BLOCKS, HEADS, SLOTS, SIZE + SIZE // 2))
    layer = layer_writing(slot_writer, cache)
    layer.head_size_v = SIZE // 2
    assert key_reader(layer) is token_major
    assert not cache.any()


def test_layers_that_differ_in_their_sinks_are_asked_one_by_one() -> None:
    """Else one with a sink would be read by what was found of one without."""
    cache = strided(KVCacheLayout.LBHNC, FLOAT)
    plain, sinking = (
        layer_writing(slot_writer, cache, sinks=sinks) for sinks in (None, torch.zeros(HEADS))
    )
    plain.attn_backend = sinking.attn_backend = CPUAttentionBackend
    names = ["layers.0.attn", "layers.1.attn"]
    group = SimpleNamespace(layer_names=names, kv_cache_spec=None)
    config: Any = SimpleNamespace(kv_cache_groups=[group])
    found = cached_layers(config, dict(zip(names, (plain, sinking), strict=True)), key_reader)
    assert next(found).found is token_major
    with pytest.raises(ValueError, match="has sinks; leave out attention_log"):
        next(found)


def test_an_unknown_layout_is_refused() -> None:
    def write(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        slot_writer(layer, key.flip(-1), value, cache, slots)

    cache = strided(KVCacheLayout.LBHNC, FLOAT)
    with pytest.raises(
        ValueError, match="SOME_BACKEND .* leave out attention_log, or choose another"
    ):
        key_reader(layer_writing(write, cache))
    assert not cache.any()


@pytest.mark.parametrize(
    ("impl", "name"),
    [
        ({"sinks": torch.zeros(HEADS)}, "sinks"),
        ({"alibi_slopes": [0.5]}, "alibi_slopes"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap"),
    ],
)
def test_attention_that_is_more_than_softmax_is_refused(impl: Any, name: str) -> None:
    layer = layer_writing(slot_writer, strided(KVCacheLayout.LBHNC, FLOAT), **impl)
    with pytest.raises(ValueError, match=f"has {name}; leave out attention_log"):
        key_reader(layer)


@pytest.mark.parametrize("window", [64, (63, 0), (63, 63)])
def test_a_layer_that_sees_a_window_is_refused(window: Any) -> None:
    """As CPU's backend and as FlashAttention hold it."""
    cache = strided(KVCacheLayout.LBHNC, FLOAT)
    with pytest.raises(ValueError, match="sees a sliding window, not every token; leave out"):
        key_reader(layer_writing(slot_writer, cache, sliding_window=window))
    combined = layer_writing(slot_writer, cache)
    variants = (SimpleNamespace(sliding_window=window), SimpleNamespace(sliding_window=window))
    combined.impl = SimpleNamespace(get_impl_variants=lambda: variants)
    with pytest.raises(ValueError, match="sees a sliding window, not every token; leave out"):
        key_reader(combined)


def test_a_layer_that_sees_a_chunk_is_refused() -> None:
    """Llama 4's local attention."""
    layer = layer_writing(slot_writer, strided(KVCacheLayout.LBHNC, FLOAT))
    layer.attention_chunk_size = 64
    with pytest.raises(ValueError, match="sees a chunk of the tokens, not every one; leave out"):
        key_reader(layer)


@pytest.mark.parametrize("none", [None, -1, (-1, -1)])
def test_no_window_is_none(none: Any) -> None:
    cache = strided(KVCacheLayout.LBHNC, FLOAT)
    assert key_reader(layer_writing(slot_writer, cache, sliding_window=none)) is token_major


@st.composite
def reads(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    """Random queries and caches, random blocks, bounds with empty spans, large logits."""
    rows, spans, per_row = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    groups, size, slots = draw(st.sampled_from((1, 3))), 8, 4
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gain = draw(st.sampled_from((0.1, 1.0, 30.0)))
    query = torch.randn(rows, 2 * groups, size, generator=generator) * gain
    cache = torch.randn(6, 2, slots, 2 * size, generator=generator)
    blocks = torch.randint(0, 6, (rows, per_row), generator=generator)
    ends = st.lists(st.integers(0, per_row * slots), min_size=spans - 1, max_size=spans - 1)
    bounds = []
    for _ in range(rows):
        last = draw(st.integers(1, per_row * slots))
        bounds.append([0, *sorted(min(end, last) for end in draw(ends)), last])
    return query, cache, blocks, torch.tensor(bounds)


@settings(deadline=None)
@given(reads(), st.booleans())
def test_spans_are_shares_of_softmax(case: tuple[torch.Tensor, ...], stale: bool) -> None:
    query, cache, blocks, bounds = case
    expected = torch.zeros(len(query), bounds.shape[1] - 1)
    logs = torch.full((len(query), query.shape[1], bounds.shape[1] - 1), -torch.inf)
    for q, (row, spans) in enumerate(zip(query, bounds.tolist(), strict=True)):
        keys = cache[blocks[q]][..., :8].transpose(0, 1).flatten(1, 2)[:, : spans[-1]]
        keys = keys.repeat_interleave(query.shape[1] // 2, 0)
        logits = 0.25 * (keys.double() @ row.double()[:, :, None])[..., 0]
        for s, (start, end) in enumerate(zip(spans[:-1], spans[1:], strict=True)):
            expected[q, s] = logits.softmax(-1)[:, start:end].sum(-1).mean()
            logs[q, :, s] = logits[:, start:end].logsumexp(-1)
    if stale:  # what no row sees is anybody's
        seen = torch.zeros(cache.shape[0] * 4, dtype=torch.bool)
        for own, spans in zip(blocks, bounds.tolist(), strict=True):
            seen[(own[:, None] * 4 + torch.arange(4)).flatten()[: spans[-1]]] = True
        cache[(~seen).view(-1, 4)[:, None].expand(-1, 2, -1)] = torch.nan
    lse = span_lse(query, cache, token_major, blocks, bounds, 0.25)
    torch.testing.assert_close(lse, logs, atol=2e-4, rtol=1e-5)
    mass = span_mass(lse)
    torch.testing.assert_close(mass, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(mass.sum(1), torch.ones(len(query)), atol=1e-5, rtol=0)
