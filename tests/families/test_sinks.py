"""Sinks of attention (MiMo-V2): a logit per head that no token owns stays where image tokens leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from vllm.exceptions import VLLMClientError

from tests.families import mimo, oracle
from tests.families.asking import every_cliff
from tests.families.making import Checkpoint
from tests.families.running import MOVED, STOCK, Engine, Judge


@contextmanager
def without_sinks(checkpoint: Checkpoint) -> Iterator[None]:
    """The reference as it is to whoever leaves them out."""
    layers = checkpoint.decoder(checkpoint.model).layers
    attentions = [layers[layer].self_attn for layer in mimo.SLIDING]
    sinks = [attention.sinks for attention in attentions]
    for attention in attentions:
        attention.sinks = None
    try:
        yield
    finally:
        for attention, own in zip(attentions, sinks, strict=True):
            attention.sinks = own


def test_sinks_stay_early_and_late(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    """Pictures that leave at the cliff, and after the prefill; no setting is needed though layers' keys differ."""
    checkpoint = checkpoint_of("mimo_v2_omni")
    engine = Engine(
        checkpoint, STOCK, additional_config={"vllm_flow": {}}, max_num_batched_tokens=32
    )
    judge, asks = Judge(engine), every_cliff(checkpoint, range(checkpoint.num_layers))
    both = [replace(ask, late=late) for late in (False, True) for ask in asks]
    outputs = engine.run(both, 12)
    judge.assert_exact(both, outputs)
    for ask, output in zip(both, outputs, strict=True):
        assert ask.cliff is not None
        asked = (judge.prompt(ask), list(output.outputs[0].token_ids)[:-1], ask.cliff, ask.late)
        one = oracle.logprobs(checkpoint, *asked)
        with without_sinks(checkpoint):
            other = oracle.logprobs(checkpoint, *asked)
        assert float((one - other).abs().max()) > MOVED
    with pytest.raises(VLLMClientError, match=r"layers\.1\..* has sinks"):
        engine.run([replace(asks[0], cliff=None, stages="1:50% last_image")], 2)
    with pytest.raises(VLLMClientError, match="where MiMoV2FlashDecoderLayer turns its queries"):
        engine.run([replace(asks[0], cliff=None, stages="1:50% unrotated")], 2)
    engine.check_idle()
