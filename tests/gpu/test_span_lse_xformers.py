"""xformers' kernel against the attention log's reference, on a CUDA device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.engine.fixtures import prepare_process

prepare_process()

from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

from tests.engine.span_cases import BATCHES, Heads, Row, make  # noqa: E402
from tests.engine.test_keys import strided  # noqa: E402
from tests.engine.xformers_masks import xformers_or_skip  # noqa: E402
from vllm_flow.engine.worker.attention.keys import span_lse, span_mass, token_major  # noqa: E402
from vllm_flow.engine.worker.attention.span_lse_xformers import (  # noqa: E402
    lse_function,
    span_lse_xformers,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = [
    Heads(4, 4, 64, 16),
    Heads(8, 2, 128, 32),
    Heads(6, 2, 64, 32, KVCacheLayout.LBHNC),
    Heads(32, 8, 128, 16),
]
LONG = [
    Row(700, ((35, 611),), answered=90, heat=True),
    Row(9000, ((35, 611), (700, 1276)), answered=500),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_its_op_is_the_reference(heads: Heads, dtype: torch.dtype) -> None:
    xformers_or_skip()
    for seed, (name, rows) in enumerate({**BATCHES, "long": LONG}.items()):
        for layer in (0, 1) if name == "evicted" else (0,):
            case = make(heads, rows, layer, dtype, "cuda", seed)
            found, expected = span_lse_xformers(*case), span_lse(*case)
            # Products of 16 bits, summed in float32, in another order than the reference's.
            torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)
            torch.testing.assert_close(span_mass(found), span_mass(expected), atol=1e-3, rtol=5e-3)


def test_nothing_stands_against_it() -> None:
    xformers_or_skip()
    cache = strided(KVCacheLayout.LBNHC, torch.bfloat16).cuda()
    attention = SimpleNamespace(kv_cache=cache, num_heads=8, head_size=64, dtype=torch.bfloat16)
    assert lse_function(attention, token_major) is span_lse_xformers
