"""Layers that are a perceptron alone (Cosmos3-Edge) keep nothing: pictures may leave late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from vllm.exceptions import VLLMClientError

from tests.families.asking import every_cliff
from tests.families.making import Checkpoint
from tests.families.running import STOCK, Engine, Judge


@pytest.mark.long
def test_pictures_leave_after_the_prefill(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    """With the settings' own storage groups, which have as many layers with keys each."""
    checkpoint = checkpoint_of("cosmos3_edge")
    engine = Engine(
        checkpoint, STOCK, additional_config={"vllm_flow": {}}, max_num_batched_tokens=32
    )
    judge, asks = Judge(engine), every_cliff(checkpoint, range(checkpoint.num_layers))
    late = [replace(ask, late=True) for ask in asks]
    judge.assert_exact(late, engine.run(late, 12))
    with pytest.raises(VLLMClientError, match=r"keys of layer 1, which has none; .* 1, 3, 5, 7"):
        engine.run([replace(asks[0], cliff=None, stages="2:50% last_image")], 2)
    engine.check_idle()
