"""pytest plugin: vLLM's tests, with the extension's classes and the list of expected differences.

``VLLM_FLOW_UPSTREAM`` names the run: ``stock`` (nothing is put in), or a number of storage groups.
An expected difference is a strict xfail: a test that is not on the list and fails, fails the run,
and so does one that is on the list and passes.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator

import pytest
from flow_upstream.expected import EXPECTED, Difference, unmatched

RUN = os.environ["VLLM_FLOW_UPSTREAM"]
_running = ""
_with_extension: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    for name in ("cpu_test", "core_model", "slow_test", "optional", "skip_global_cleanup"):
        config.addinivalue_line("markers", f"{name}: vLLM's own")
    if RUN != "stock":
        from flow_upstream.put_in import install

        install(int(RUN), lambda: _with_extension.add(_running))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = [difference for difference in EXPECTED if RUN in difference.runs]
    for item in items:
        for difference in listed:
            if difference.matches(item.nodeid):
                item.add_marker(_mark(difference))
    gone = unmatched(listed, [item.nodeid for item in items])
    if gone and not config.getoption("keyword"):
        raise pytest.UsageError(
            "expected differences that match no test any more: " + ", ".join(sorted(gone))
        )


def _mark(difference: Difference) -> pytest.MarkDecorator:
    return pytest.mark.xfail(
        strict=True,
        raises=difference.raises,
        reason=f"{difference.kind}: {difference.reason}",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _running
    _running = item.nodeid


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files = Counter(node_id.partition("::")[0].rpartition("/")[2] for node_id in _with_extension)
    counts = ", ".join(f"{file} {count}" for file, count in files.most_common())
    terminalreporter.write_line(f"tests that built the extension's classes: {counts or 'none'}")


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The fixture that vLLM's tests read its log through, which is in a file that is not fetched."""
    logger = logging.getLogger("vllm")
    before, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.INFO):
        yield caplog
    logger.propagate = before
