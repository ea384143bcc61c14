"""Runs vLLM's own tests, in a process of their own: their package is called ``tests``, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.upstream.standins import write_hub

HERE = Path(__file__).resolve().parent

FILES = ("tests/v1/core", "tests/v1/test_kv_cache_spec_registry.py")
"""What a run covers: all that is fetched."""

LEFT_OUT = {
    "tests/v1/core/prefix_cache/test_hybrid_prefix_cache_hit_rate.py": "a model with its weights",
    "tests/v1/core/test_reset_prefix_cache_e2e.py": "a model with its weights",
    "tests/v1/core/test_scheduler_e2e.py": "a model with its weights",
}
"""Files that are not run, and what they need."""

LONG = (
    "tests/v1/core/test_kv_cache_utils.py",
    "tests/v1/core/test_priority_scheduler_random.py",
)
"""In the long run only: nearly nothing of ours is built in the one, the other takes ten minutes."""

LONG_RUN = "VLLM_FLOW_UPSTREAM_LONG"
"""Environment variable: 1 for the long run."""


def is_long() -> bool:
    """Whether this is the long run."""
    return os.environ.get(LONG_RUN) == "1"


@dataclass(frozen=True)
class Run:
    """One way to run vLLM's tests."""

    name: str
    """``stock``, or the number of storage groups that every cache is put in."""
    folder: Path
    """Holds vLLM's ``tests``."""
    scratch: Path
    """Where the stand-ins for hub models go."""
    long: bool = field(default_factory=is_long)
    """Whether :data:`LONG` are run, too."""

    def command(self, *options: str, files: Sequence[str] = FILES) -> list[str]:
        """The pytest command, for :attr:`folder`."""
        return [
            *(sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={self.folder}"),
            *("-p", "flow_upstream.plugin", "-p", "no:cacheprovider", "-q", "--tb=short"),
            *(f"--ignore={file}" for file in LEFT_OUT),
            *(() if self.long else (f"--ignore={file}" for file in LONG)),
            *("-p", "pytest_timeout", "--timeout=300", "-W", "ignore::DeprecationWarning"),
            *options,
            *files,
        ]

    def environment(self) -> dict[str, str]:
        """Writes the stand-ins, and returns the environment that finds them."""
        if not (self.scratch / "hub").exists():
            write_hub(self.scratch)
        path = [str(HERE), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "HF_HOME": str(self.scratch),
            "HF_HUB_OFFLINE": "1",
            "VLLM_FLOW_UPSTREAM": self.name,
            # Its own plugins and no others: vLLM's tests are not written for those of this house.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
