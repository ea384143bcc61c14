"""Fixtures and process settings shared by the engine suites of both model runners."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    from tests.engine.bare_scheduler import OpenBare
    from tests.engine.harness import Engine, Engines
    from tests.engine.tiny_llava import Shape

OpenEngine: TypeAlias = "Callable[..., Engine]"
"""``open_engine(shape, group_layers, **options)``."""

PROCESS = {
    # One process: the tests look into the scheduler, and start-up is paid once.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Tiny matrices: a second thread costs more than it gives, and seconds per call on a busy machine.
    "OMP_NUM_THREADS": "1",
    # vLLM compiles the counting of logprob ranks, anew for every engine: seconds for a comparison of a few floats.
    "TORCHDYNAMO_DISABLE": "1",
    # vLLM looks for drafts in loops that numba compiles, in half a minute.
    "NUMBA_DISABLE_JIT": "1",
    # As numba starts, it sets the number of OpenMP's threads for everybody in the process.
    "NUMBA_NUM_THREADS": "1",
}


def prepare_process() -> None:
    """Set what vLLM and torch read when they are imported."""
    for name, value in PROCESS.items():
        os.environ.setdefault(name, value)


def skip_below(folder: Path, items: list[pytest.Item], reason: str) -> None:
    """Skip the tests of one folder; a hook in a conftest.py is handed those of all folders."""
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def engine_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Checkpoints and open engines of the session."""
    from tests.engine.harness import Engines

    store = Engines(tmp_path_factory.mktemp("checkpoints"))
    yield store
    store.close()


@pytest.fixture(scope="module", autouse=True)
def workers_end_with_their_module() -> Iterator[None]:
    """Engines with workers of their own are those of one module's tests."""
    yield
    from tests.engine import two_workers

    two_workers.shut_down_but(0)


@pytest.fixture
def open_engine(engine_store: Engines) -> Iterator[OpenEngine]:
    """``open_engine(shape, group_layers, **options)``; every engine a test used must end up idle and sound."""
    used: list[Engine] = []

    def get(shape: Shape, group_layers: int | None, **options: Any) -> Engine:
        engine = engine_store.get(shape, group_layers, **options)
        used.append(engine)
        return engine

    yield get
    for engine in used:
        engine.check_idle()


@pytest.fixture
def together(open_engine: OpenEngine) -> Iterator[Engine]:
    """The engine of ``options.TOGETHER``.

    vLLM keeps the workers' half of a KV connector per process: of every engine in it, were it there.
    """
    from vllm.distributed.kv_transfer import kv_transfer_state as state

    from tests.engine import options
    from tests.engine.cases import LONG

    state._KV_CONNECTOR_AGENT = options.workers_half
    try:
        engine = open_engine(LONG, 2, **options.TOGETHER)
        options.workers_half = state._KV_CONNECTOR_AGENT
        yield engine
    finally:
        state._KV_CONNECTOR_AGENT = None


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> OpenBare:
    """``bare(group_layers, spare, **arguments)``: a scheduler without a model."""
    from tests.engine.bare_scheduler import LAYERS, opener
    from tests.engine.tiny_llava import Shape, build

    return opener(build(Shape(layers=LAYERS), tmp_path_factory.mktemp("bare")))
