"""The tests of vLLM that are expected to fail, in which run, and why. Nothing else may.

Knows neither pytest nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EVERY_RUN = ("stock", "1", "2")


@dataclass(frozen=True)
class Difference:
    """Tests that fail for one reason; every test that it names must."""

    kind: str
    """In a few words, the same for all of a kind."""
    reason: str
    """What the tests do that makes them fail, in one sentence."""
    tests: tuple[str, ...]
    """``file.py::test``; all of a test's parameters, or ``test[parameters]``; ``*`` is anything."""
    runs: tuple[str, ...]
    """``stock``, or numbers of storage groups."""
    raises: type[Exception] | tuple[type[Exception], ...] = AssertionError
    """With what they fail; another failure is a new one."""

    def matches(self, node_id: str) -> bool:
        """Whether this difference names the test."""
        return any(_names(pattern, node_id) for pattern in self.tests)


def _names(pattern: str, node_id: str) -> bool:
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(rf"(.*/)?{expression}(\[.*\])?", node_id) is not None


def unmatched(differences: Iterable[Difference], node_ids: Sequence[str]) -> list[str]:
    """Patterns that name none of the tests, though tests of their file were collected."""
    files = {_file(node_id) for node_id in node_ids}
    return [
        pattern
        for difference in differences
        for pattern in difference.tests
        if _file(pattern) in files and not any(_names(pattern, node_id) for node_id in node_ids)
    ]


def _file(node_id: str) -> str:
    return node_id.partition("::")[0].rpartition("/")[2]


BY_HAND = "puts the scheduler together by hand"

EXPECTED: tuple[Difference, ...] = (
    Difference(
        BY_HAND,
        "makes a scheduler without its constructor, so that it has nothing of ours.",
        (
            "test_scheduler.py::test_abort_request_when_structured_output_fsm_cannot_advance",
            "test_async_scheduler.py::test_abort_request_when_structured_output_fsm_cannot_advance",
        ),
        ("1", "2"),
        AttributeError,
    ),
    Difference(
        BY_HAND,
        "gives a scheduler another KV-cache manager, with HiSparse groups that ours refuses.",
        (
            "test_prefix_caching.py::test_hisparse_async_admission_requires_full_prompt_host_pages",
            "test_prefix_caching.py::test_hisparse_admitted_async_loads_can_finish_with_nothing_running",
        ),
        ("1", "2"),
        AttributeError,
    ),
)
