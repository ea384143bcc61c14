"""Patch: ``OutputProcessor.process_outputs`` also counts what was evicted. Ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap


def apply(observe: Callable[[Any], None]) -> None:
    """Call ``observe(engine_core_outputs)`` before each step's outputs are processed."""
    from vllm.v1.engine.output_processor import OutputProcessor

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            observe(engine_core_outputs)
            return original(self, engine_core_outputs, *args, **kwargs)

        return process_outputs

    wrap(OutputProcessor, "process_outputs", around)


def revert() -> None:
    """Put the original back."""
    from vllm.v1.engine.output_processor import OutputProcessor

    unwrap(OutputProcessor, "process_outputs")
