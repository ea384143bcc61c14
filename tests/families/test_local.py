"""Chunks of local attention (Llama 4): past a cliff they count kept tokens; what reads every key is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from vllm.exceptions import VLLMClientError

from tests.families import oracle
from tests.families.asking import every_cliff
from tests.families.making import Checkpoint
from tests.families.running import MOVED, Engine, Judge


def test_chunks_count_kept_tokens_early_and_late(
    checkpoint_of: Callable[[str], Checkpoint],
) -> None:
    """Chunks of 32, two layers to a storage group; pictures that leave at the cliff, and after the prefill."""
    checkpoint = checkpoint_of("llama4")
    engine = Engine(checkpoint, group_layers=2, max_num_batched_tokens=32)
    judge, asks = Judge(engine), every_cliff(checkpoint, range(checkpoint.num_layers))
    both = [replace(ask, late=late) for late in (False, True) for ask in asks]
    outputs = engine.run(both, 12)
    judge.assert_exact(both, outputs)
    # The other reading, chunks by position in the prompt, is another answer wherever a layer past the cliff has them.
    by_position = replace(checkpoint, local={})
    for ask, output in zip(asks, outputs, strict=False):
        assert ask.cliff is not None
        answer = list(output.outputs[0].token_ids)[:-1]
        one, other = (
            oracle.logprobs(made, judge.prompt(ask), answer, ask.cliff)
            for made in (checkpoint, by_position)
        )
        local = any(layer >= ask.cliff for layer in checkpoint.local)
        assert bool((one - other).abs().max() > MOVED) == local
    with pytest.raises(VLLMClientError, match=r"layers\.0\..* sees a chunk of the tokens"):
        engine.run([replace(asks[0], cliff=None, stages="1:50% last_image")], 2)
    engine.check_idle()
