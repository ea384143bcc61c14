"""Drafters under Model Runner V2, where the device alone knows how many drafts were taken."""

from __future__ import annotations

from tests.engine.cases import LONG
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact
from tests.engine.options import DRAFTS
from tests.engine.test_drafters import (
    by_all,
    engine,
    test_drafts_are_those_of_the_head_over_what_the_target_kept,
)
from tests.engine.test_speculative import ASKS, OPTIONS, counted
from tests.engine_v2.recorded_graphs import recorded_graphs

__all__ = [
    "engine",
    "test_drafts_are_those_of_the_head_over_what_the_target_kept",
]

GRAPHS = [4, 8, 16, 48]
"""Rows: each request has four."""


@by_all
def test_captured_steps_are_exact(engine: Engine) -> None:
    """Prompts that arrive in chunks join them, in steps that are not captured. EAGLE drafts in graphs of its own."""
    with counted(engine) as drafted, recorded_graphs(engine, GRAPHS) as graphs:
        outputs = engine.run(ASKS)
    assert_exact(engine, ASKS, outputs)
    assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 20, drafted
    assert len(set(graphs.replayed)) > 2
    in_graphs = engine.llm.llm_engine.vllm_config.speculative_config.use_eagle()
    assert bool(graphs.drafts) == in_graphs


def test_drafts_from_the_text_are_exact(open_engine: OpenEngine) -> None:
    """Looked for on the device, where scheduling is asynchronous, too; captured and not."""
    own = {"speculative_config": DRAFTS | {"method": "ngram_gpu"}, "async_scheduling": True}
    engine, asks = open_engine(LONG, 2, **OPTIONS | own), ASKS[:3]
    for graphs in ([4, 8], None):
        with counted(engine) as drafted:
            if graphs is None:
                outputs = engine.run(asks)
            else:
                with recorded_graphs(engine, graphs) as recorded:
                    outputs = engine.run(asks)
                assert len(set(recorded.replayed)) == 2
        assert_exact(engine, asks, outputs)
        assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 10, drafted
