"""The engine suite under Model Runner V2, on CPU through Triton's interpreter.

Runs in a process of its own: ``VLLM_USE_V2_MODEL_RUNNER=1 pytest tests/engine_v2``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import v2_cpu
from tests.engine.fixtures import (
    bare,
    engine_store,
    open_engine,
    prepare_process,
    skip_below,
    together,
    workers_end_with_their_module,
)

__all__ = ["bare", "engine_store", "open_engine", "together", "workers_end_with_their_module"]

prepare_process()
if v2_cpu.wanted():
    v2_cpu.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not v2_cpu.wanted():
        skip_below(Path(__file__).parent, items, f"set {v2_cpu.SWITCH}=1, in a process of its own")
