"""Processes, checkpoints and the table of the family tests.

``VLLM_FLOW_FAMILIES=all`` runs every checkpoint (``make test-families``), a comma-separated list runs
those, and without it a few stand for the rest. The model runner is the process's
(``VLLM_USE_V2_MODEL_RUNNER``), ``VLLM_FLOW_COMPILED=1`` leaves torch.compile on, and ``inductor`` its
back end too, as vLLM starts by itself; the table goes to the terminal, and to the file that
``VLLM_FLOW_FAMILIES_TABLE`` names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from tests.engine import v2_cpu
from tests.engine.fixtures import prepare_process, workers_end_with_their_module

if TYPE_CHECKING:
    from tests.families.making import Checkpoint

__all__ = ["workers_end_with_their_module"]

COMPILED = os.environ.get("VLLM_FLOW_COMPILED", "")
"""Engines as vLLM starts them; with 1 Dynamo's trace runs as it is, without Inductor's minutes."""
if COMPILED:
    inductor = COMPILED == "inductor"
    os.environ |= {"TORCHDYNAMO_DISABLE": "0", "VLLM_CPU_CI_ENV": "0" if inductor else "1"}
prepare_process()
INTERPRETED = (
    *("gemma3", "gemma4", "gemma4_moe", "gemma4_unified", "mimo_v2_omni_narrow"),
    *("molmo2_qwen3", "molmo2_olmo3", "molmo2_video"),
)
"""Checkpoints whose attention backend is written in Triton, under either model runner."""
if (
    v2_cpu.wanted() or set(INTERPRETED) & set(os.environ.get("VLLM_FLOW_FAMILIES", "").split(","))
) and os.environ.get("TRITON_INTERPRET") != "1":
    v2_cpu.install()

TABLE = "VLLM_FLOW_FAMILIES_TABLE"
Rows: TypeAlias = "list[dict[str, Any]]"
_ROWS: Rows = []


@pytest.fixture(scope="session")
def checkpoint_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Checkpoint]]:
    """``checkpoint_of(name)``: built once per session."""
    from tests.families.checkpoints import build

    root = tmp_path_factory.mktemp("families")
    built: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in built:
            built[name] = build(name, root)
        return built[name]

    yield get
    if "tests.families.running" in sys.modules:  # else nobody opened an engine
        sys.modules["tests.families.running"].close_all()


@pytest.fixture(scope="session")
def table() -> Rows:
    """Rows of results, printed at the end."""
    return _ROWS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _ROWS:
        return
    terminalreporter.section("families")
    for row in _ROWS:
        terminalreporter.write_line(
            f"{row['family']:22} {row['runner']}  {row['what']:32} {row['answers']:4} answers  "
            f"largest logprob error {row['error']:.1e}"
        )
    if TABLE in os.environ:
        where = Path(os.environ[TABLE])
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(json.dumps(_ROWS, indent=1))
