"""The list of expected differences: what it names, and that a run fails where it is not true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.upstream.flow_upstream.expected import EVERY_RUN, EXPECTED, Difference, unmatched

HERE = Path(__file__).parent


def listed(*tests: str) -> Difference:
    return Difference("kind", "reason", tests, EVERY_RUN)


@pytest.mark.parametrize(
    ("pattern", "node_id", "names"),
    [
        ("test_a.py::test_x", "tests/v1/core/test_a.py::test_x", True),
        ("test_a.py::test_x", "tests/v1/core/test_a.py::test_x[1-True]", True),
        ("test_a.py::test_x", "tests/v1/core/test_a.py::test_xy", False),
        ("test_a.py::test_x", "tests/v1/core/test_aa.py::test_x", False),
        ("a.py::test_x", "tests/v1/core/test_a.py::test_x", False),
        ("test_a.py::test_x[1]", "test_a.py::test_x[1]", True),
        ("test_a.py::test_x[1]", "test_a.py::test_x[11]", False),
        ("test_a.py::test_x[1-*]", "test_a.py::test_x[1-True]", True),
        ("test_a.py::*_x", "test_a.py::TestY::test_x", True),
    ],
)
def test_patterns(pattern: str, node_id: str, names: bool) -> None:
    assert listed(pattern).matches(node_id) is names


def test_patterns_that_name_nothing() -> None:
    entries = [
        listed("test_a.py::test_x"),
        listed("test_a.py::test_gone"),
        listed("test_b.py::test_x"),
    ]
    # Nothing of test_b.py was collected: another run's.
    assert unmatched(entries, ["tests/v1/core/test_a.py::test_x[1]"]) == ["test_a.py::test_gone"]


def test_the_list_has_reasons_and_names_nothing_twice_in_a_run() -> None:
    seen = set()
    for difference in EXPECTED:
        assert difference.kind and difference.reason.endswith(".")
        assert difference.tests and set(difference.runs) <= set(EVERY_RUN) and difference.runs
        for pattern in difference.tests:
            for run in difference.runs:
                assert (pattern, run) not in seen
                seen.add((pattern, run))


FAKE = """
def test_passes():
    pass

def test_asserts():
    assert False

def test_dies():
    raise TypeError
"""


@pytest.mark.parametrize(
    ("tests", "status", "words"),
    [
        (["test_asserts"], 1, "1 failed, 1 passed, 1 xfailed"),  # one is not listed
        # A TypeError is another failure than what is listed.
        (["test_asserts", "test_dies"], 1, "1 failed, 1 passed, 1 xfailed"),
        (["test_passes", "test_asserts"], 1, "2 failed, 1 xfailed"),  # no longer different
        (["test_asserts", "test_gone"], 4, "match no test any more: test_fake.py::test_gone"),
    ],
)
def test_a_run_fails_where_the_list_is_not_true(
    tmp_path: Path, tests: list[str], status: int, words: str
) -> None:
    (tmp_path / "test_fake.py").write_text(FAKE)
    entries = ", ".join(f"'test_fake.py::{name}'" for name in tests)
    (tmp_path / "list_for_test.py").write_text(
        "from flow_upstream import expected\n"
        f"expected.EXPECTED = (expected.Difference('k', 'r.', ({entries},), ('stock',)),)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={tmp_path}", "-q"]
        + ["-p", "list_for_test", "-p", "flow_upstream.plugin", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(HERE),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "VLLM_FLOW_UPSTREAM": "stock",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
