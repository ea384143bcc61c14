"""The attention log's kernel goes through Triton's compiler, to a program for the GPU; no GPU is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.longer import some
from vllm_flow.engine.worker.attention import span_lse_triton
from vllm_flow.engine.worker.attention.keys import READERS, span_lse
from vllm_flow.engine.worker.attention.span_lse_triton import lse_function

triton = pytest.importorskip("triton")

POINTERS = {"blocks_QM": "*i64", "bounds_QS1": "*i64", "lse_QHSP": "*fp32", "scale": "fp32"}
CONTIGUOUS = ("stride_query_dim", "stride_key_dim", "stride_blocks_column", "stride_bounds_span")


@pytest.mark.parametrize("capability", some([80, 90], [90]))
@pytest.mark.parametrize(
    ("dtype", "group", "size"), [("bf16", 1, 128), ("fp16", 7, 80), ("fp32", 4, 64)]
)
def test_it_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, dtype: str, group: int,
    size: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Where vLLM sees no device, it hands out a stand-in for Triton, and functions stay as they are.
    monkeypatch.setattr(span_lse_triton, "tl", triton.language)
    kernel = triton.jit(span_lse_triton._span_lse)
    fixed = span_lse_triton.tile_of(group, size)
    fixed |= {"SLOTS": 16, "GROUP": group, "SIZE": size, "PART": span_lse_triton.PART}
    fixed |= dict.fromkeys(CONTIGUOUS, 1)
    types = {"query_QHD": f"*{dtype}", "keys_BKND": f"*{dtype}", **POINTERS}
    source = triton.compiler.ASTSource(
        kernel,
        {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names},
        constexprs={(kernel.arg_names.index(n),): value for n, value in fixed.items()},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": True})
    assert f".target sm_{capability}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000


def test_without_a_device_the_reference_runs() -> None:
    for read in READERS:
        assert lse_function("auto", torch.device("cpu"), read) is span_lse
