"""What two workers need on one machine, whose engine is not the first of its process."""

from __future__ import annotations

import pytest

from tests.engine import v2_cpu
from tests.engine.starting import during_the_test


def a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """For engines that start from here on, until the test is over."""
    cores_of(monkeypatch, 2)
    # torch has threads here already
    during_the_test(monkeypatch, "VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if v2_cpu.wanted():
        v2_cpu.install_in_workers(monkeypatch)


def cores_of(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """The two cores in turn, for engines with more workers than these."""
    bind = "|".join(str(worker % 2) for worker in range(workers))
    during_the_test(monkeypatch, "VLLM_CPU_OMP_THREADS_BIND", bind)


def stages_of(monkeypatch: pytest.MonkeyPatch, partition: str) -> None:
    """Layers of each stage, for engines that start from here on."""
    during_the_test(monkeypatch, "VLLM_PP_LAYER_PARTITION", partition)
