"""Runs vLLM's own tests, in a process of their own: their package is called ``tests``, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.upstream import fetch
from tests.upstream.standins import write_hub

HERE = Path(__file__).resolve().parent

CORE = (
    "tests/v1/core/test_scheduler.py",
    "tests/v1/core/test_async_scheduler.py",
    "tests/v1/core/test_prefix_caching.py",
)
RUNS = ("1", "2")


def command(run: str, folder: Path, files: Sequence[str], *options: str) -> list[str]:
    """The pytest command of a run over ``files``, relative to ``folder`` (where it is to be run)."""
    return [
        *(sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={folder}"),
        *("-p", "flow_upstream.plugin", "-p", "no:cacheprovider", "-q", "--tb=short"),
        *("--timeout=300", *options, *files),
    ]
