"""Two pipeline stages of other families than LLaVA: M-RoPE, and features that are injected between layers."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.engine.two_workers import a_core_each, stages_of
from tests.families.asking import every_cliff
from tests.families.making import Checkpoint
from tests.families.running import Engine, Judge


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
@pytest.mark.parametrize(
    ("name", "partition"),
    # vLLM injects Qwen3-VL's features on the first stage alone.
    [("qwen3_vl", "4,2"), ("qwen2_vl", "1,3"), ("mistral3", "2,2")],
)
def test_two_stages_are_exact(
    name: str,
    partition: str,
    checkpoint_of: Callable[[str], Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every cliff in chunks of 32, then again from the cache."""
    a_core_each(monkeypatch)
    stages_of(monkeypatch, partition)
    checkpoint = checkpoint_of(name)
    engine = Engine(
        checkpoint,
        # One group per layer of the shorter stage.
        group_layers=checkpoint.num_layers // min(map(int, partition.split(","))),
        pipeline_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=32,
        enable_prefix_caching=True,
    )
    judge = Judge(engine)
    asks = every_cliff(checkpoint, [None, *range(checkpoint.num_layers + 1)])
    judge.assert_exact(asks, engine.run(asks, 16))
    again = engine.run(asks, 16)
    assert any(output.num_cached_tokens for output in again)
    judge.assert_exact(asks, again)
    engine.check_idle()
