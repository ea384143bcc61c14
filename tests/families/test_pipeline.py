"""Two workers of other families than LLaVA: pipeline stages, with M-RoPE and features injected between layers; halves
of the heads, with ranks that go by what a video's frames repeat."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.engine.two_workers import a_core_each, stages_of
from tests.families.asking import every_cliff, prompts_of
from tests.families.making import Checkpoint, film
from tests.families.running import Engine, Judge
from tests.families.test_exact import OF_FRAMES


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


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
@pytest.mark.parametrize("name", ["qwen2_5_vl_video", "internvl_video"])
def test_two_workers_keep_the_same_of_a_video(
    name: str, checkpoint_of: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has half of the heads, and finds out by itself which tokens of six frames stay."""
    a_core_each(monkeypatch)
    checkpoint = checkpoint_of(name)
    engine = Engine(
        checkpoint, group_layers=1, tensor_parallel_size=2, distributed_executor_backend="mp"
    )
    ask, _ = prompts_of(checkpoint)
    seen = film(3, checkpoint.sizes[0], frames=6 * checkpoint.seen_together)
    asks = [replace(ask, films=(seen,), stages=stages) for stages in OF_FRAMES]
    outputs = engine.run(asks, 6)
    # What reaches the decoder is read off an engine in this process.
    Judge(Engine(checkpoint, group_layers=1)).assert_exact(asks, outputs)
    engine.check_idle()
