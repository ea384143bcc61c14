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
    workers_end_with_their_module,
)

__all__ = ["bare", "engine_store", "open_engine", "together", "workers_end_with_their_module"]

prepare_process()


LAST = ["test_drafters.py", "test_speculative.py"]
"""Whatever engine starts after one that drafts, in the same process, gives wrong answers about pictures
(vLLM 0.32 on CPU, without the extension too; the drafting engine and those before it are exact)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(LAST)}
    items.sort(key=lambda item: place.get(item.path.name, -1))
    if v2_cpu.wanted():
        skip_below(Path(__file__).parent, items, f"this process runs V2; unset {v2_cpu.SWITCH}")
