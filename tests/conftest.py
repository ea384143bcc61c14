"""What every suite's process is told: property tests have no deadline, since a busy machine is no fault and speed is
measured elsewhere; and what takes seconds without being tested is left out."""

from __future__ import annotations

import gc
import os
import signal
import sys

from hypothesis import settings

# Ray runs its workers at niceness 15: beside other suites on every processor they would hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")

# In a shell's background (`make test &`) it is ignored, and so by every process that is started from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("vllm-flow", deadline=None)
settings.load_profile("vllm-flow")


def pytest_collection_finish() -> None:
    """Modules stay: no collection of garbage looks through them again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Pytest would collect garbage five times, and Python does once more at its end."""
    gc.unfreeze()
    gc.collect = lambda *_: 0


def pytest_runtest_setup() -> None:
    look_in_this_process()


def look_in_this_process() -> None:
    """vLLM looks at a model class in a process of its own, which imports vLLM anew for every architecture.

    It keeps CUDA out of this one so; here is none.
    """
    registry = sys.modules.get("vllm.model_executor.models.registry")
    if registry is not None and sys.modules["vllm.platforms"].current_platform.is_cpu():
        registry._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]
