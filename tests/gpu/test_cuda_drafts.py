"""On CUDA: drafts are checked exactly, eagerly, in graphs and as vLLM starts by itself."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.cases import LONG
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engines, assert_exact
from tests.engine.options import DRAFTS
from tests.engine.test_speculative import ASKS, counted
from tests.engine.tiny_drafters import METHODS, speculation
from tests.gpu.backends import triton, v1
from tests.gpu.test_cuda_exactness import EXECUTIONS, replays


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("method", [*METHODS, "ngram"])
def test_answers_are_exact_whatever_was_drafted(
    engine_store: Engines,
    open_engine: OpenEngine,
    method: str,
    execution: dict[str, Any],
    asynchronous: bool,
) -> None:
    if method != "ngram":
        drafter = speculation(method, LONG, engine_store.root)
    elif asynchronous and v1():
        pytest.skip("vLLM schedules ngram synchronously")
    else:
        drafter = DRAFTS | ({"method": "ngram_gpu"} if asynchronous else {})
    own = {"speculative_config": drafter, "async_scheduling": asynchronous}
    engine = open_engine(LONG, 4, **triton(**execution | own), max_num_batched_tokens=512)
    with replays(engine) as sizes, counted(engine) as drafted:
        outputs = engine.run(ASKS)
    assert_exact(engine, ASKS, outputs)
    assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 20, drafted
    assert bool(sizes) == (bool(execution) and not v1())
