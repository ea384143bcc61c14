"""Counts what vLLM's metadata builder for CPUs builds."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder


def built(monkeypatch: pytest.MonkeyPatch, method: str = "build") -> list[Any]:
    """What a method of the builder returns from now on, of every group."""
    found: list[Any] = []
    build = getattr(CPUAttentionMetadataBuilder, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(build(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(CPUAttentionMetadataBuilder, method, noted)
    return found
