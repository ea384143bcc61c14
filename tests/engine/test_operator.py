"""The operator's settings: a default for clients that send nothing, and bounds for those that do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.cases import GQA, one_image, text_only
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact


def engine_with(open_engine: OpenEngine, **flow: Any) -> Engine:
    return open_engine(GQA, 2, additional_config={"vllm_flow": {"group_layers": 2, **flow}})


def test_a_default_policy_is_for_requests_that_send_none(open_engine: OpenEngine) -> None:
    engine = engine_with(open_engine, default_policy={"flow_cliff": 1})
    silent = [one_image(401), one_image(402), text_only(403)]
    expected = [replace(ask, cliff=1) for ask in silent[:2]] + silent[2:]
    assert_exact(engine, expected, engine.run(silent))
    # A client may ask for something else, the baseline too.
    spoken = [one_image(404, 3), one_image(405, GQA.layers)]
    assert_exact(engine, spoken, engine.run(spoken))


def test_a_default_policy_stays_away_from_requests_it_does_not_fit(open_engine: OpenEngine) -> None:
    engine = engine_with(open_engine, default_policy={"flow_cliff": 1})
    at_the_end = one_image(407, after=0)
    assert_exact(engine, [at_the_end], engine.run([at_the_end]))


def test_bounds_are_kept(open_engine: OpenEngine) -> None:
    engine = engine_with(open_engine, max_policy={"flow_cliff": 2})
    with pytest.raises(ValueError, match="flow_cliff=1: .* from 2 to 4"):
        engine.run([one_image(408, 1)])
    asks = [one_image(408, 2), one_image(409, 3), one_image(410)]
    assert_exact(engine, asks, engine.run(asks))


def test_policies_may_be_forbidden(open_engine: OpenEngine) -> None:
    engine = engine_with(open_engine, default_policy={"flow_cliff": 2}, allow_request_policy=False)
    with pytest.raises(ValueError, match="flow_cliff=3: the operator of this server sets"):
        engine.run([one_image(411, 3)])
    ask = one_image(411)
    assert_exact(engine, [replace(ask, cliff=2)], engine.run([ask]))
