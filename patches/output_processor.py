"""Patch: ``OutputProcessor.process_outputs`` also counts what was evicted. Ledger in README.md."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_vllm_flow_patch"


def apply(observe: Callable[[Any], None]) -> None:
    """Call ``observe(engine_core_outputs)`` before each step's outputs are processed."""
    from vllm.v1.engine.output_processor import OutputProcessor

    original = OutputProcessor.process_outputs
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        observe(engine_core_outputs)
        return original(self, engine_core_outputs, *args, **kwargs)

    setattr(process_outputs, _MARK, original)
    OutputProcessor.process_outputs = process_outputs


def revert() -> None:
    """Put the original back."""
    from vllm.v1.engine.output_processor import OutputProcessor

    OutputProcessor.process_outputs = getattr(
        OutputProcessor.process_outputs, _MARK, OutputProcessor.process_outputs
    )
