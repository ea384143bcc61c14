"""Attention backends and kinds of execution on CUDA, as options of an engine. Knows no test."""

from __future__ import annotations

import os
from typing import Any

from tests.engine.cases import Shape

EAGER: dict[str, Any] = {}
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32],
    },
}
DEFAULT: dict[str, Any] = {
    "enforce_eager": False,
    "async_scheduling": True,
    "compilation_config": {
        "cudagraph_mode": "PIECEWISE"
        if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
        else "FULL_AND_PIECEWISE",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
    },
}
"""As vLLM starts without a flag, with fewer sizes to capture."""

SHARED: dict[str, Any] = {"block_size": 16, "gpu_memory_utilization": 0.1}
"""Of all engines: many share the device, and what vLLM would want free for one is not."""

WIDE = Shape("llama", layers=4, heads=4, kv_heads=2, head_dim=64, grid=12, seed=7)
"""A head size that FlashAttention 3 takes, and an image of 144 tokens."""


def triton(**options: Any) -> dict[str, Any]:
    """Triton attention in float32: what the oracle computes, to float tolerance."""
    return {"attention_config": {"backend": "TRITON_ATTN"}, **SHARED, **options}


def flash(**options: Any) -> dict[str, Any]:
    """FlashAttention, which computes in half precision."""
    config = {"backend": "FLASH_ATTN"}
    return {"attention_config": config, "dtype": "bfloat16", **SHARED, **options}


def flashinfer(**options: Any) -> dict[str, Any]:
    """FlashInfer, in half precision: on Blackwell by TRT-LLM's kernels, on Hopper decode steps by XQA."""
    return flash(**options) | {"attention_config": {"backend": "FLASHINFER"}}


def v1() -> bool:
    """Whether this process runs the deprecated Model Runner V1."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
