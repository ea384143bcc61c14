"""A backend of CUDA itself, its Triton kernel included, stores keys where the attention log looks for them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.engine.test_keys import SIZE, layer_writing, strided
from vllm_flow.engine.keys import key_reader, token_major


@pytest.mark.parametrize("layout", [KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.LHBNC])
def test_the_reader_finds_what_tritons_backend_wrote(
    monkeypatch: pytest.MonkeyPatch, layout: KVCacheLayout
) -> None:
    # Asked for the size of a tile only, by a kernel that the interpreter runs.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend = SimpleNamespace(
        attn_type=AttentionType.DECODER,
        _is_per_token_head_quant=False,
        head_size=SIZE,
        kv_cache_dtype="auto",
    )
    layer = layer_writing(
        partial(TritonAttentionImpl.do_kv_cache_update, backend),
        strided(layout, torch.float32),
    )
    layer._k_scale = layer._v_scale = torch.ones(())
    assert key_reader(layer) is token_major
