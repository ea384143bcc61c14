"""Property tests have no deadline: a busy machine is no fault, and speed is measured elsewhere."""

from __future__ import annotations

import os
import sys

from hypothesis import settings

# Ray runs its workers at niceness 15: beside other suites on every processor they would hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")

settings.register_profile("vllm-flow", deadline=None)
settings.load_profile("vllm-flow")


def pytest_runtest_setup() -> None:
    """vLLM reads what a model class can do in a process that imports vLLM anew: ten seconds for every architecture.

    So that it initialises no GPU in this one, which a CPU has not.
    """
    registry = sys.modules.get("vllm.model_executor.models.registry")
    if registry is not None and sys.modules["vllm.platforms"].current_platform.is_cpu():
        registry._run_in_subprocess = lambda function: function()  # type: ignore[attr-defined]
