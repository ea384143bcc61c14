"""What two workers need on one machine, whose engine is not the first of its process."""

from __future__ import annotations

import pytest
from vllm import envs


def a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """For engines that start from here on, until the test is over."""
    for name, value in {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",  # a core for each
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # torch has threads here already
    }.items():
        monkeypatch.setenv(name, value)  # for the workers
        # vLLM keeps what it read when it started the first engine of this process.
        monkeypatch.setattr(envs, name, value, raising=False)


def cores_of(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """The two cores in turn, for engines with more workers than these."""
    bind = "|".join(str(worker % 2) for worker in range(workers))
    monkeypatch.setattr(envs, "VLLM_CPU_OMP_THREADS_BIND", bind, raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)


def stages_of(monkeypatch: pytest.MonkeyPatch, partition: str) -> None:
    """Layers of each stage, for engines that start from here on."""
    # vLLM keeps what it read when it started the first engine of this process; what it read before is restored.
    monkeypatch.setattr(envs, "VLLM_PP_LAYER_PARTITION", partition, raising=False)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
