"""The engine suite under Model Runner V1, the one that vLLM picks on CPU."""

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
)

__all__ = ["bare", "engine_store", "open_engine", "together"]

prepare_process()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if v2_cpu.wanted():
        skip_below(Path(__file__).parent, items, f"this process runs V2; unset {v2_cpu.SWITCH}")
