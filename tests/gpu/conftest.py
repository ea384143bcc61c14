"""The engine's tests on a CUDA device; without one they are skipped.

vLLM chooses its model runner once per process: ``make test-gpu`` runs them once under each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engine.fixtures import engine_store, open_engine, prepare_process, skip_below

__all__ = ["engine_store", "open_engine"]

# Engines that compile as vLLM does by default are among those to be tested.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "0")
# Triton multiplies float32 in 10 bits of mantissa unless told otherwise; read when a kernel is compiled.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
prepare_process()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
    if not torch.cuda.is_available():
        skip_below(Path(__file__).parent, items, "no CUDA device")
