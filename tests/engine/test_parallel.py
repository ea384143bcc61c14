"""Tensor parallelism: two workers with half of the heads each make the same plan of every step.

Data parallelism is the server's affair: tests/server/test_parallel.py.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.engine.cases import LONG, mixed, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.two_workers import a_core_each
from tests.longer import long_under_v2
from vllm_flow.engine.inspect import footprints
from vllm_flow.engine.report import REPORT_KEY


@long_under_v2
@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_workers_are_exact(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    a_core_each(monkeypatch)
    options = dict(distributed_executor_backend="mp", enable_prefix_caching=True)
    engine = open_engine(
        LONG, 2, tensor_parallel_size=2, max_num_batched_tokens=192, max_num_seqs=8, **options
    )
    # With sums of their own, the two would keep other tokens.
    ranked = [
        replace(one_image(70 + n), stages=stages)
        for n, stages in enumerate(
            (
                *("1:50% last_image, 3:20% last_image", "2:50% last_prompt", "0:50% diversity"),
                *("1:50% question, 3:20% raters", "2:50% feather, 4:30% unrotated", "2:40% dart"),
                *("0:50% cls_attention", "0:50% received_attention"),
                *("0:50% visionzip", "0:40% prumerge_plus, 3:20% uniform"),
                *("0:50% hired", "0:40% holov, 3:20% scope", "0:40% holov_received"),
            )
        )
    ]
    asks = [
        *mixed(LONG.layers),
        *ranked,
        one_image(11, 3),
    ]  # the last shares the first one's prefix
    outputs = engine.run(asks[:-1]) + engine.run(asks[-1:])
    assert_exact(engine, asks, outputs)
    assert outputs[-1].num_cached_tokens
    # Bytes are those of all workers together.
    found = outputs[0].kv_transfer_params[REPORT_KEY]
    alone = open_engine(LONG, 2).run(asks[:1])[0].kv_transfer_params[REPORT_KEY]
    assert found["kv_bytes_saved"] == alone["kv_bytes_saved"] > 0
    assert footprints(engine.llm)
