"""The kernel that refreshes captured decode steps goes through Triton's compiler; no GPU is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.longer import some
from vllm_flow.engine.worker import decode_graphs

triton = pytest.importorskip("triton")

TYPES = {
    "seq_lens": "*i32",
    "facts": "*i32",
    "group_of_layer": "*i32",
    "table_pointers": "*u64",
    "table_strides": "*i64",
    "block_sizes": "*i32",
    "layer_seq_lens": "*i32",
    "layer_slots": "*i64",
}


@pytest.mark.parametrize("capability", some([80, 90], [90]))
def test_it_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Where vLLM sees no device, it hands out a stand-in for Triton, and functions stay as they are.
    monkeypatch.setattr(decode_graphs, "tl", triton.language)
    kernel = triton.jit(decode_graphs._refresh_kernel)
    fixed = {"PAD": -1, "BLOCK": decode_graphs.REQUESTS}
    source = triton.compiler.ASTSource(
        kernel,
        {n: "constexpr" if n in fixed else TYPES.get(n, "i32") for n in kernel.arg_names},
        constexprs={(kernel.arg_names.index(n),): value for n, value in fixed.items()},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target)
    assert f".target sm_{capability}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
