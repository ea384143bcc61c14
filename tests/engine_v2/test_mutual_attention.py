"""Gemma 3, whose pictures attend in both directions, through Triton's attention: a few requests beside the oracle.

``make test-families`` asks more of it, under both model runners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.engine import v2_cpu
from tests.families.making import Checkpoint

TOKENS = 3


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    from tests.families.checkpoints import build

    yield build("gemma3", tmp_path_factory.mktemp("families"))
    from tests.families import running

    running.close_all()


@pytest.mark.skipif(not v2_cpu.wanted(), reason="needs Triton's interpreter")
def test_pictures_that_see_themselves(gemma3: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a policy, at a cliff, after the prefill, and with a part left of the picture: one batch, in chunks."""
    from tests.families.asking import prompts_of
    from tests.families.running import Engine, Judge

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_args: (9, 0))
    one, two = prompts_of(gemma3)
    asks = [two, replace(two, cliff=2), replace(one, cliff=1, late=True)]
    asks.append(replace(one, stages="1:60% uniform, 3:0"))
    # Two pictures do not fit a step, and beside the text before it not always one.
    engine = Engine(gemma3, 2, max_num_batched_tokens=32)
    Judge(engine).assert_exact(asks, engine.run(asks, TOKENS))
    engine.check_idle()
