"""What two workers need on one machine, whose engine is not the first of its process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import v2_cpu
from tests.engine.starting import during_the_test

MOST = 2
"""Engines with workers in processes of their own that stay open, of one module of tests: a worker holds most of a GB,
and its threads never sleep for long."""
_OPEN: list[Any] = []


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


def keep_few_open(llm: Any) -> None:
    """Note an engine that has started, and shut down those before it but the newest, where they have workers.

    Workers in this process share their process groups with all its engines, and stay.
    """
    if llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        _OPEN.append(llm)
    shut_down_but(MOST)


def shut_down_but(newest: int) -> None:
    """End the workers of all but the newest engines that have some.

    The rest of such an engine stays: its end would destroy the process groups of those without workers, too.
    """
    while len(_OPEN) > newest:
        _OPEN.pop(0).llm_engine.engine_core.engine_core.model_executor.shutdown()


def is_shut(llm: Any) -> bool:
    """Whether :func:`keep_few_open` has shut an engine down."""
    several = llm.llm_engine.vllm_config.parallel_config.world_size > 1
    return several and not any(llm is other for other in _OPEN)
