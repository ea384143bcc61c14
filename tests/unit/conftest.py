"""What several tests of the demo look at: a made-up run with a known curve per kind."""

from __future__ import annotations

import pytest

from tests.unit.synthetic import synthetic_results
from vllm_flow.demo.measurements import Results


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return synthetic_results(tmp_path_factory.mktemp("pictures"), headline=56)
