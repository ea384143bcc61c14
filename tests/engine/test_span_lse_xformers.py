"""The attention log by xformers: its masks say which keys each span has, and what it cannot read is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.engine.span_cases import BATCHES, GROUPS, Case, Heads, make
from tests.engine.test_keys import strided
from tests.engine.xformers_masks import materialised_lse, xformers_or_skip
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.worker.attention import span_lse_xformers, tap, xformers_needs
from vllm_flow.engine.worker.attention.keys import column_major, span_lse, tiled_pairs, token_major

BY_TOKEN = [heads for heads in GROUPS if heads.read is token_major]
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture
def materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    xformers_or_skip()
    monkeypatch.setattr(span_lse_xformers, "partial_lse", materialised_lse)


def assert_equal(case: Case) -> None:
    found, expected = span_lse_xformers.span_lse_xformers(*case), span_lse(*case)
    assert found.shape == expected.shape and found.dtype == FLOAT
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("materialised")
@pytest.mark.parametrize("heads", BY_TOKEN, ids=str)
def test_the_masks_are_the_spans(heads: Heads) -> None:
    for seed, (name, rows) in enumerate(BATCHES.items()):
        for layer in (0, 1) if name == "evicted" else (0,):
            case = make(heads, rows, layer, HALF, "cpu", seed)
            assert_equal(case)
    *_, bounds, _ = case
    assert (bounds.diff() == 0).any(), "past the cliff an image's span is empty"


@pytest.mark.usefixtures("materialised")
def test_pairs_go_in_as_many_launches_as_a_grid_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []

    def counted(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        launches.append(len(query))
        return materialised_lse(query, *rest)

    monkeypatch.setattr(span_lse_xformers, "partial_lse", counted)
    monkeypatch.setattr(xformers_needs, "MOST_PROGRAMS", 11)
    case = make(BY_TOKEN[1], BATCHES["heat"], 0, HALF, "cpu")
    assert_equal(case)
    pairs = len(case[0]) * (case[4].shape[1] - 1)
    assert sum(launches) == pairs and max(launches) == 11 // 2 < pairs


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.LHBNC]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_pages_lie_where_blocks_do(
    layout: KVCacheLayout, blocks: int, heads: int, others: int
) -> None:
    """Whatever lies between one block and the next."""
    slots, size = 16, 32
    memory = strided(layout, FLOAT, (blocks * (others + 1), heads, slots, 2 * size))
    cache = memory[:: others + 1]
    cache.copy_(torch.randn(cache.shape))
    keys = cache[..., :size]
    _, key = span_lse_xformers.inputs_of(torch.zeros(1, 2 * heads, size), keys)
    factor = span_lse_xformers.pages_of_a_block(keys)
    for block in range(blocks):
        page = key[0, block * factor * slots :][:slots]
        assert torch.equal(page[:, :, 0], keys[block].transpose(0, 1))
        assert torch.equal(page[:, :, 1], page[:, :, 0])


def layer(cache: torch.Tensor, size: int = 64, dtype: torch.dtype = HALF) -> Any:
    return SimpleNamespace(kv_cache=cache, num_heads=8, head_size=size, dtype=dtype)


CACHE = strided(KVCacheLayout.LBNHC, HALF)


@pytest.mark.parametrize(
    ("attention", "read", "there", "says"),
    [
        (layer(CACHE), token_major, False, "not installed .pip install 'vllm-flow.xformers.'."),
        (layer(CACHE), tiled_pairs, True, "as tiled_pairs, out of the reach"),
        (layer(CACHE), column_major, True, "as column_major, not key after key"),
        (layer(CACHE[:, :, :24]), token_major, True, "blocks of 24 slots"),
    ],
)
def test_what_stands_against_it_is_said(
    monkeypatch: pytest.MonkeyPatch, attention: Any, read: Any, there: bool, says: str
) -> None:
    spec = object() if there else None
    monkeypatch.setattr(xformers_needs, "find_spec", lambda name: spec)
    monkeypatch.setattr(xformers_needs, "version", lambda name: "3.8.0")
    with pytest.raises(ValueError, match=f"kernel='xformers': .*{says}.*; leave it out"):
        span_lse_xformers.lse_function(attention, read)


def test_a_triton_without_block_pointers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_needs, "find_spec", lambda name: object())
    monkeypatch.setattr(xformers_needs, "version", lambda name: "3.9.0")
    with pytest.raises(ValueError, match="kernel='xformers': .*Triton 3.9.0 has no longer; leave"):
        span_lse_xformers.lse_function(layer(CACHE), token_major)


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        (layer(CACHE), "device=cpu"),
        (layer(strided(KVCacheLayout.LBNHC, FLOAT), dtype=FLOAT), "dtype=torch.float32"),
        (layer(strided(KVCacheLayout.LBNHC, HALF, (3, 2, 16, 160)), 80), "Embed dim 80"),
    ],
)
def test_what_its_op_does_not_take_it_says_itself(
    monkeypatch: pytest.MonkeyPatch, attention: Any, says: str
) -> None:
    xformers_or_skip()
    monkeypatch.setattr(xformers_needs, "version", lambda name: "3.8.0")
    with pytest.raises(ValueError, match=f"kernel='xformers': .*{says}.*; leave it out"):
        span_lse_xformers.lse_function(attention, token_major)


def test_the_setting_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At start-up, for every layer; what stands against it ends the start."""
    monkeypatch.setattr(tap, "key_reader", lambda attention: column_major)
    monkeypatch.setattr(tap, "cached_layers", lambda config, layers, ways: [ways(layers["only"])])
    monkeypatch.setattr(xformers_needs, "missing", lambda: None)
    with pytest.raises(ValueError, match="kernel='xformers': .*column_major.*; leave it out"):
        tap.AttentionTap(None, {"only": layer(CACHE)}, "xformers")
    assert (
        FlowSettings.read(
            {"attention_log": "x", "attention_log_kernel": "xformers"}, EngineFacts(4)
        ).attention_log_kernel
        == "xformers"
    )
