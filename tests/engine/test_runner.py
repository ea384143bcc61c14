"""The suite runs under the model runner it says it runs under."""

from __future__ import annotations

import pytest

from tests.engine import v2_cpu
from tests.engine.cases import GQA
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK


@pytest.mark.parametrize("group_layers", [STOCK, 2])
def test_model_runner(open_engine: OpenEngine, group_layers: int | None) -> None:
    core = open_engine(GQA, group_layers).llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    modules = {kind.__module__ for kind in type(runner).__mro__}
    assert ("vllm.v1.worker.gpu.model_runner" in modules) == v2_cpu.wanted()
    assert ("vllm.v1.worker.gpu_model_runner" in modules) != v2_cpu.wanted()
