"""vLLM's own tests of its scheduler and KV cache pass with the extension's classes and no policy.

Except for the expected differences, which are listed with their reasons. Each run is a pytest of its
own; its results are one test here.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.upstream import fetch
from tests.upstream.run import Run, is_long

CHECKED = ("1", "2") if is_long() else ("2",)
"""Storage groups of each run."""
SUMMARY = re.compile(r"\d+ (passed|failed|error).* in [\d.]+s")


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return fetch.tests_of(fetch.installed_version())
    except fetch.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("groups", CHECKED)
def test_vllms_own_tests(
    groups: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(groups, folder, tmp_path)
    done = subprocess.run(
        run.command(), cwd=folder, env=run.environment(), capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    summary = next((line for line in reversed(lines) if SUMMARY.search(line)), "no result")
    with capsys.disabled():
        print(f"\nvLLM's own tests, storage groups: {groups}: {summary}")
    assert done.returncode == 0, "\n".join([*lines[-300:], done.stderr[-2000:]])
