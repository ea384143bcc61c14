"""Under Model Runner V2 a step's attention is planned once for all storage groups, and answers stay what they are."""

from __future__ import annotations

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from tests.engine.building import built
from tests.engine.cases import GQA, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from vllm_flow.engine.worker.cpu_groups import SharedSchedule


@pytest.mark.parametrize(("can_update", "builds"), [(True, 1), (False, GQA.layers)])
def test_a_step_of_requests_without_a_policy_is_planned_once(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, can_update: bool, builds: int
) -> None:
    """FlashAttention can, vLLM's backend for CPUs cannot by itself."""
    builds_made = built(monkeypatch)
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "supports_update_block_table", can_update)
    update = SharedSchedule.update_block_table
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "update_block_table", update)
    engine = open_engine(GQA, 1)
    ask = one_image(1)
    builds_made.clear()
    outputs = engine.run([ask])
    assert_exact(engine, [ask], outputs)
    # The prompt in one step, then a token per step.
    assert len(builds_made) == builds * ask.max_tokens
