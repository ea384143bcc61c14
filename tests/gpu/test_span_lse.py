"""The attention log's kernel as Triton compiles it, against its reference, on a CUDA device.

Runs where there is one: ``pytest tests/gpu``. Without one, ``tests/engine_v2`` runs the same kernel
through Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.fixtures import prepare_process

prepare_process()

from tests.engine.span_cases import BATCHES, GROUPS, Heads, Row, make  # noqa: E402
from vllm_flow.engine.worker.attention.keys import span_lse, span_mass, token_major  # noqa: E402
from vllm_flow.engine.worker.attention.span_lse_triton import lse_function, span_lse_triton  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LLAVA_7B, LLAMA_8B = Heads(32, 32, 128, 16), Heads(32, 8, 128, 16)
LONG = [
    Row(700, ((35, 611),), answered=90, heat=True),
    Row(9000, ((35, 611), (700, 1276)), answered=500),
]
"""LLaVA-1.5's picture token by token, beside a conversation whose spans take several programs."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [*GROUPS, LLAVA_7B, LLAMA_8B], ids=str)
def test_the_compiled_kernel_is_the_reference(heads: Heads, dtype: torch.dtype) -> None:
    batches = dict(BATCHES)
    if heads in (LLAVA_7B, LLAMA_8B):
        batches = {"long": LONG}
    for seed, (name, rows) in enumerate(batches.items()):
        for layer in (0, 1) if name == "evicted" else (0,):
            case = make(heads, rows, layer, dtype, "cuda", seed)
            found, expected = span_lse_triton(*case), span_lse(*case)
            # Both compute in float32, the reference by cuBLAS, which may choose its order of sums.
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(span_mass(found), span_mass(expected), atol=1e-4, rtol=1e-3)


def test_it_is_what_runs_on_cuda() -> None:
    assert lse_function("auto", torch.device("cuda"), token_major) is span_lse_triton
