"""Whose count of accepted drafts is whose, when rows of Model Runner V1's batch move."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_flow.engine.worker.accepted_counts import counts_by_former_rows


@pytest.mark.parametrize("mode", ["align", "none"])
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in turn"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "nothing sampled"])
def test_counts_stay_where_vllm_looks_for_them(mode: str, ahead: bool, sampled: bool) -> None:
    """Three requests, of which the first ends, and the last takes its row."""
    counts = np.array([2, 3, 4, 1])
    waited: list[bool] = []
    batch = SimpleNamespace(num_accepted_tokens_cpu=np.ones(4, int))
    batch.prev_req_id_to_index = {"b": 1, "c": 2} if sampled else {}

    def arrive() -> None:
        waited.append(True)
        batch.num_accepted_tokens_cpu[:] = counts

    runner = SimpleNamespace(
        num_accepted_tokens_event=SimpleNamespace(synchronize=arrive),
        use_async_scheduling=ahead,
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode=mode)),
        input_batch=batch,
    )
    with counts_by_former_rows(runner):
        batch.num_accepted_tokens_cpu[0] = batch.num_accepted_tokens_cpu[2]
    ours = ahead and mode == "align"
    assert bool(waited) == ours
    found = batch.num_accepted_tokens_cpu.tolist()
    assert found == ([2, 3, 4, 1] if sampled else [4, 3, 4, 1]) if ours else [1, 1, 1, 1]


def test_without_drafts_nothing_is_kept() -> None:
    runner = SimpleNamespace(
        num_accepted_tokens_event=None,
        use_async_scheduling=True,
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode="align")),
    )
    with counts_by_former_rows(runner):
        pass
