"""The same on vLLM's FlashInfer backend under Model Runner V2, and decode steps that replay as full graphs."""

from __future__ import annotations

import pytest
from vllm.v1.attention.backend import AttentionCGSupport

from tests.engine.cases import GQA, mixed
from tests.engine.fixtures import OpenEngine
from tests.engine.flashinfer_cases import on, runner_of
from tests.engine.harness import assert_exact
from tests.engine.test_flashinfer import (
    test_chunks_and_cached_prefixes_are_exact,
    test_cliffs_in_one_batch_are_exact,
    test_with_one_builder_they_are_not,
)
from tests.engine_v2.recorded_graphs import recorded_graphs
from tests.longer import some

__all__ = [
    "test_chunks_and_cached_prefixes_are_exact",
    "test_cliffs_in_one_batch_are_exact",
    "test_with_one_builder_they_are_not",
]


@pytest.mark.parametrize("device", some(["blackwell", "xqa"], ["blackwell"]))
def test_decode_steps_replay_as_full_graphs(open_engine: OpenEngine, device: str) -> None:
    """TRT-LLM's kernels and XQA read lengths, tables and slots alone, which are refreshed for each layer."""
    asks = mixed(GQA.layers)
    with on(device, open_engine, GQA, 2) as engine, recorded_graphs(engine, [1, 4, 16]) as graphs:
        outputs = engine.run(asks)
        assert_exact(engine, asks, outputs)
    assert graphs.replayed and set(graphs.widths) == {1}


def test_decode_steps_that_are_planned_have_graphs_of_pieces(open_engine: OpenEngine) -> None:
    with on("native", open_engine, GQA, 2) as engine:
        runner = runner_of(engine)
        support, reason = runner.model_state.get_additional_cg_support()
    assert support == AttentionCGSupport.NEVER
    assert reason == (
        "FLASHINFER (with vLLM-Flow, it has full graphs where it decodes with TRT-LLM's kernels)"
    )
    builders = [
        group.get_metadata_builder(0) for of_group in runner.attn_groups for group in of_group
    ]
    assert len({id(builder._get_workspace_buffer()) for builder in builders}) == 1
