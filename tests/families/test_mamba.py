"""Mamba 2: states are found again where vLLM would keep one from within a step, and with vLLM-Flow ends the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.engine import v2_cpu
from tests.families.asking import every_cliff, prompts_of
from tests.families.making import Checkpoint
from tests.families.running import Engine, Judge

TOKENS = 6


@pytest.mark.skipif(
    v2_cpu.wanted(), reason="where steps end is the scheduler's, and V2's interpreter slow"
)
def test_whole_prompts_are_found_again_exactly(
    checkpoint_of: Callable[[str], Checkpoint],
) -> None:
    """All cliffs and the baseline in one batch, without chunks; then again, and under longer prompts."""
    checkpoint = checkpoint_of("nemotron_nano_v2_vl")
    engine = Engine(checkpoint, group_layers=2, enable_prefix_caching=True)
    judge = Judge(engine)
    asks = every_cliff(checkpoint, [None, 0, 2, 3, 5, 7])
    judge.assert_exact(asks, engine.run(asks, TOKENS))
    again = engine.run(asks, TOKENS)
    judge.assert_exact(asks, again)
    assert all(output.num_cached_tokens for output in again)
    first, _ = prompts_of(checkpoint)
    longer = [replace(first, text=f"{first.text} w1 w2 w3", cliff=cliff) for cliff in (None, 0, 3)]
    judge.assert_exact(longer, engine.run(longer, TOKENS))
    engine.check_idle()
