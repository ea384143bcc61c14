"""CUDA's backends store keys where the attention log, and its kernel, look for them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.engine.test_keys import HEADS, SIZE, SLOTS, layer_writing, strided
from vllm_flow.engine.worker.attention.keys import key_reader, span_lse, token_major
from vllm_flow.engine.worker.attention.span_lse_triton import span_lse_triton

# The logarithm of an empty span's sum, in the interpreter's numpy.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

LAYOUTS = [KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.LHBNC]


@pytest.fixture(params=[TritonAttentionImpl, FlashAttentionImpl], ids=["TRITON", "FLASH"])
def write(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's own writing; FlashAttention's operator is CUDA's, so Triton's twin stands in for it."""
    # Asked for the size of a tile only, by a kernel that the interpreter runs.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    name, twin = "reshape_and_cache_flash", triton_reshape_and_cache_flash
    monkeypatch.setattr(flash_attn, name, twin, raising=False)
    backend = SimpleNamespace(
        attn_type=AttentionType.DECODER,
        _is_per_token_head_quant=False,
        head_size=SIZE,
        kv_cache_dtype="auto",
    )
    return partial(request.param.do_kv_cache_update, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_backend_wrote_is_found(write: Any, layout: KVCacheLayout) -> None:
    layer = layer_writing(write, strided(layout, torch.float32))
    layer._k_scale = layer._v_scale = torch.ones(())
    read = key_reader(layer)
    assert read is token_major
    # A row's keys, written through the backend and read by both ways to compute.
    keys = torch.randn(2 * SLOTS, HEADS, SIZE)
    blocks = torch.tensor([[3, 1]])
    slots = (blocks[0][:, None] * SLOTS + torch.arange(SLOTS)).flatten()
    write(layer, keys, -keys, layer.kv_cache, slots)
    query, bounds = torch.randn(1, 2 * HEADS, SIZE), torch.tensor([[0, 5, 5, 40, 51]])
    logits = torch.einsum("hd,thd->ht", query[0], keys.repeat_interleave(2, 1)) / 8
    expected = torch.stack(
        [logits[:, a:b].logsumexp(1) for a, b in ((0, 5), (0, 0), (5, 40), (40, 51))], 1
    )
    for lse in (span_lse, span_lse_triton):
        found = lse(query, layer.kv_cache, read, blocks, bounds, 1 / 8)
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
