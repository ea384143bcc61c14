"""Lets vLLM compile in pieces on a CPU, where it would compile the decoder as one; graphs of pieces are recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from tests.engine.compiling import allow_compiling


def compile_in_pieces(monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> None:
    """As vLLM does on CUDA; pieces are traced by Dynamo, and compiled by Inductor where ``backend`` says so."""
    allow_compiling(monkeypatch, inductor=True)
    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_keep(config: Any) -> None:
        check(config)
        compilation = config.compilation_config
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.backend = backend
        compilation.compile_sizes = []  # what CUDA takes from the sizes of its graphs

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(check_and_keep))
