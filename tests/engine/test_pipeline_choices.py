"""Choices of the device, handed on between a pipeline's stages: whoever knows of a token what a rank goes by, tells."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.engine.cases import LONG, one_image, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.policy_cases import DEVICE, LATE, ROWS
from tests.engine.test_pipeline import TWO
from tests.engine.two_workers import a_core_each

@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_first(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    a_core_each(monkeypatch)
    engine = open_engine(LONG, 2, **TWO)
    for stages in ("2:50% last_prompt", "0:50% diversity", "3:50% last_prompt", "4:50% last_prompt", "4:50% diversity"):
        print(stages, flush=True)
        asks = [replace(one_image(70, 4), stages=stages, max_tokens=6)]
        assert_exact(engine, asks, engine.run(asks))
