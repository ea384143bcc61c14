"""Layers of several windows in one storage group, on vLLM's FlashInfer backend over a stand-in of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine import flashinfer_standin as standin
from tests.families.asking import every_cliff
from tests.families.making import Checkpoint
from tests.families.running import Engine, Judge
from tests.longer import some

DEVICES = {"native": standin.NATIVE, "blackwell": standin.BLACKWELL}


@pytest.mark.parametrize("device", some(DEVICES, ["native"]))
def test_each_window_is_planned_by_itself(
    checkpoint_of: Callable[[str], Checkpoint], device: str
) -> None:
    """FlashInfer's own kernels are planned for one window, TRT-LLM's are told each layer's."""
    checkpoint = checkpoint_of("cohere2_vision")
    assert 0 < len(checkpoint.windows) < checkpoint.num_layers
    asks = every_cliff(checkpoint, range(checkpoint.num_layers))
    with standin.flashinfer(DEVICES[device]):
        engine = Engine(
            checkpoint,
            checkpoint.num_layers,
            attention_config={"backend": "FLASHINFER"},
            max_num_batched_tokens=48,
        )
        (groups,) = engine.runner.attn_groups
        assert len(groups) == 2
        Judge(engine).assert_exact(asks, engine.run(asks, 8))
        engine.check_idle()
