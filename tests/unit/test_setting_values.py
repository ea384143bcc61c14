"""Settings that would have no effect beside the others, or contradict them: refused, each in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.cliff_file import FORMAT
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_bounds import contradicts
from vllm_flow.policy_keys import parse_policy

LAYERS = 32
LOG = {"attention_log": "log"}


def stages(text: str, **more: str) -> dict[str, str]:
    return {"flow_stages": text, **more}


def profile(default: int | None = None, **tasks: int) -> dict[str, Any]:
    entries = {task: {"flow_cliff": cliff} for task, cliff in tasks.items()}
    content = {"format": FORMAT, "model": "m", "num_layers": LAYERS, "tasks": entries}
    if default is not None:
        content["default"] = {"flow_cliff": default}
    return {"profile": content}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_log_max_bytes": 9},
            r"\['attention_log_max_bytes'\]=9: no attention is logged.*in 'attention_log', or leave",
        ),
        ({"attention_log_kernel": "torch"}, r"\['attention_log_kernel'\]='torch': no attention is"),
        ({"attention_log": None, "attention_log_kernel": "auto"}, "no attention is logged"),
        (
            {"max_policy": {"flow_cliff": 9}, "allow_request_policy": False},
            r"\['max_policy'\]: 'allow_request_policy' is false.*leave one of the two out",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSettings.read(options, EngineFacts(LAYERS))


def test_with_what_it_is_for_each_is_taken() -> None:
    found = FlowSettings.read(
        {**LOG, "attention_log_max_bytes": 9, "attention_log_kernel": "torch"}, EngineFacts(LAYERS)
    )
    assert (found.attention_log_max_bytes, found.attention_log_kernel) == (9, "torch")
    bounded = {"max_policy": {"flow_cliff": 9}, "allow_request_policy": True}
    assert FlowSettings.read(bounded, EngineFacts(LAYERS)).max_policy == FlowPolicy.withdrawal(9)
    assert not FlowSettings.read(
        {"allow_request_policy": False}, EngineFacts(LAYERS)
    ).allow_request_policy


@pytest.mark.parametrize(
    ("default", "most", "named"),
    [
        ({"flow_cliff": 8}, {"flow_cliff": 9}, '"8:0" evicts more'),
        ({"flow_cliff": 8}, {"flow_cliff": LAYERS}, '"8:0" evicts more'),
        ({"flow_cliff": 8}, {"flow_cliff": 8, "flow_when": "decode"}, '"8:0" evicts more'),
        (stages("4:144 uniform"), stages("4:145 uniform"), '"4:144 uniform" evicts more'),
        (stages("4:25% uniform"), stages("4:50% uniform"), "evicts more"),
        (profile(a=8, b=20), {"flow_cliff": 9}, r"\"8:0\" of the task 'a' evicts more"),
        (profile(a=8), {"flow_cliff": 9}, r"\"8:0\" of the task 'a' evicts more"),
        (profile(8, a=20), {"flow_cliff": 9}, '"8:0" evicts more'),
    ],
    ids=str,
)
def test_a_default_that_evicts_more_than_is_allowed_is_refused(
    default: dict[str, Any], most: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"\['default_policy'\]: .*{named}.*'max_policy' lets"):
        FlowSettings.read({"default_policy": default, "max_policy": most}, EngineFacts(LAYERS))


@pytest.mark.parametrize(
    ("default", "most"),
    [
        ({"flow_cliff": 9}, {"flow_cliff": 9}),
        ({"flow_cliff": LAYERS}, {"flow_cliff": LAYERS}),
        ({"flow_cliff": 9, "flow_when": "decode"}, {"flow_cliff": 9}),
        (profile(9, a=20, b=LAYERS), {"flow_cliff": 9}),
        # Of 576 tokens the half is more than 144, of 200 it is less: the picture decides.
        (stages("4:50% uniform"), stages("4:144 uniform")),
        (stages("4:144 uniform"), stages("4:50% uniform")),
    ],
    ids=str,
)
def test_one_within_its_bounds_is_taken(default: dict[str, Any], most: dict[str, Any]) -> None:
    FlowSettings.read({"default_policy": default, "max_policy": most}, EngineFacts(LAYERS))


@given(st.integers(0, LAYERS - 1), st.integers(0, LAYERS))
@settings(deadline=None)
def test_a_cliff_contradicts_every_deeper_one(cliff: int, most: int) -> None:
    policy = parse_policy({"flow_cliff": cliff}, LAYERS)
    assert policy is not None
    assert contradicts(policy, FlowPolicy.withdrawal(most), LAYERS) == (cliff < most)
