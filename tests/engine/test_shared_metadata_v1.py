"""Under Model Runner V1 on a GPU, too, a step's attention is planned once for all storage groups.

On a CPU `cpu_groups` does that in its own way, which is turned off here.
"""

from __future__ import annotations

import pytest

from tests.engine.building import built
from tests.engine.cases import GQA, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.test_last_layer import runner_of


@pytest.mark.parametrize(("can_update", "builds"), [(True, 1), (False, GQA.layers)])
def test_a_step_of_requests_without_a_policy_is_planned_once(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, can_update: bool, builds: int
) -> None:
    """FlashAttention can take a second group's blocks; a backend that cannot builds for each."""
    engine = open_engine(GQA, 1)
    runner, ask = runner_of(engine), one_image(1)
    groups = runner.attn_groups
    assert len(groups) == GQA.layers
    builds_made = built(monkeypatch)
    monkeypatch.setattr(runner, "flow_shared_build", None)
    for (group,) in groups:
        builder = group.get_metadata_builder(0)
        monkeypatch.setattr(builder, "supports_update_block_table", can_update)
    outputs = engine.run([ask])
    assert_exact(engine, [ask], outputs)
    # The prompt in one step, then a token per step.
    assert len(builds_made) == builds * ask.max_tokens
    assert runner.attn_groups is groups, "shown for the build alone"


def test_captures_build_every_group_by_itself(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(open_engine(GQA, 1))
    captured = built(monkeypatch, "build_for_cudagraph_capture")
    monkeypatch.setattr(runner, "flow_shared_build", None)
    for (group,) in runner.attn_groups:
        monkeypatch.setattr(group.get_metadata_builder(0), "supports_update_block_table", True)
    slots, _ = runner._get_slot_mappings(2, 2, 2)
    runner._build_attention_metadata(
        2, 2, 1, num_tokens_padded=2, num_reqs_padded=2, for_cudagraph_capture=True,
        slot_mappings=slots,
    )  # fmt: skip
    assert len(captured) == GQA.layers
