"""What Model Runner V2 alone does beside a pipeline: steps are scheduled before the tokens of earlier ones are known,
and decode steps are captured whole, on every stage. The rest: ``tests/engine/test_pipeline.py``."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from vllm.config.compilation import CUDAGraphMode

from tests.engine import traffic
from tests.engine.cases import LONG, mixed, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.policy_cases import BEHIND, LATE
from tests.engine.test_pipeline import TWO
from tests.engine.test_stress import TINY_POOL
from tests.engine.two_workers import a_core_each, cores_of, stages_of
from tests.engine_v2 import recorded_graphs

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")


@pytest.mark.slow
def test_graphs_and_eager_steps_of_stages_take_turns(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests join a running batch, in chunks, and steps are padded for graphs of pieces. Each stage pads them
    alike, and replays the same ones."""
    a_core_each(monkeypatch)
    stages_of(monkeypatch, "2,4")
    engine = open_engine(
        LONG, 3, **TWO, async_scheduling=True, max_num_batched_tokens=160, max_num_seqs=8
    )
    sizes, mode = [1, 2, 4, 8, 64, 160], CUDAGraphMode.FULL_AND_PIECEWISE
    engine.llm.collective_rpc(recorded_graphs.record, args=(sizes, mode))
    asks = [
        *mixed(LONG.layers)[1:4],
        *(one_image(80 + cliff, cliff) for cliff in (1, 2, 4)),
        replace(one_image(90), stages="1:50% uniform, 4:20% uniform"),
        replace(one_image(100, 1), late=True),
        *(replace(one_image(120 + n), stages=BEHIND[n]) for n in (0, 2, 4)),
        replace(one_image(110), stages=LATE[0], late=True),
    ]
    assert_exact(engine, asks, engine.run_joining(asks))
    first, last = engine.llm.collective_rpc(recorded_graphs.recorded)
    assert first == last
    replayed, padded = first
    assert len(set(replayed)) > 2 and len(set(padded)) > 2


@pytest.mark.long
@pytest.mark.parametrize("stages", [2, 3])
def test_random_traffic_over_stages_is_exact(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    """Preempted, aborted, cached, several steps in flight."""
    a_core_each(monkeypatch)
    cores_of(monkeypatch, stages)
    engine = open_engine(
        LONG,
        stages,
        **TWO | {"pipeline_parallel_size": stages},
        # Of each stage, which has fewer layers where there are more: room for two of the longest requests.
        kv_cache_memory_bytes=TINY_POOL * 3 // (2 * stages),
        max_num_seqs=12,
        enable_prefix_caching=True,
        async_scheduling=True,
        max_num_batched_tokens=512,
    )
    went = traffic.run(engine, 1, 30, stages=0.5, late=0.3)
    assert went.preempted and went.aborted and went.finished > 8
