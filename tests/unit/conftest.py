"""What several tests of the demo look at: a made-up run with a known curve per kind."""

from __future__ import annotations

import pytest

from tests.unit.synthetic import FEW_CLIFFS, POLICIES, synthetic_results
from vllm_flow.demo.measurements import Results


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return synthetic_results(tmp_path_factory.mktemp("pictures"), headline=56)


@pytest.fixture(scope="session")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A small run with policies beside its cliffs."""
    return synthetic_results(tmp_path_factory.mktemp("pictures"), 12, FEW_CLIFFS, POLICIES)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The same without policies."""
    return synthetic_results(tmp_path_factory.mktemp("pictures"), 12, FEW_CLIFFS)
