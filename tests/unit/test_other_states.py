"""What is said of models whose states are not Gated DeltaNet's, from their configuration."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flow.engine import states
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end.fitting_engine import unfit
from vllm_flow.policy import FlowPolicy, Stage

LFM2 = ("lfm2", ["conv", "full_attention", "conv"])
NEMOTRON_H = ("nemotron_h", ["linear_attention", "mlp", "full_attention", "moe"])


COSMOS3_EDGE = ("cosmos3_edge_text", ["full_attention", "mlp"] * 2)
"""Without states: its perceptrons keep nothing."""


def config(kind: str, layers: list[str], **asked: Any) -> Any:
    """As much of a VllmConfig as is read."""
    text = SimpleNamespace(model_type=kind, layer_types=layers)
    model = SimpleNamespace(hf_text_config=text, is_hybrid=kind != COSMOS3_EDGE[0])
    options = dict.fromkeys(states.BESIDE.values()) | asked
    return SimpleNamespace(model_config=model, **options)


@pytest.mark.parametrize(
    ("kind", "attending"), [(LFM2, (1,)), (NEMOTRON_H, (2,)), (COSMOS3_EDGE, (0, 2))]
)
def test_layers_that_attend_are_known_by_their_types(kind: Any, attending: tuple[int, ...]) -> None:
    assert states.attending(config(*kind).model_config) == attending


@pytest.mark.parametrize("kind", [LFM2, NEMOTRON_H, COSMOS3_EDGE])
def test_what_nobody_has_tried_beside_them_is_refused_by_its_option(kind: Any) -> None:
    assert states.reason_against(config(*kind)) is None
    for option, name in states.BESIDE.items():
        told = states.reason_against(config(*kind, **{name: object()}))
        assert told is not None and told.endswith(f"leave out {option}.")
    both = states.reason_against(config(*kind, lora_config=1, kv_transfer_config=1))
    assert both is not None and both.endswith("leave out kv_transfer_config, enable_lora.")


def test_what_keeps_nothing_can_leave_after_the_prefill() -> None:
    late = FlowPolicy(((Stage(1, 0),),), when="decode")
    engine = EngineFacts(3, attending=(0, 2), keep_states=False)
    assert not list(unfit(late, engine))
    [refused] = unfit(late, replace(engine, keep_states=True))
    assert "after the prefill" in refused.sentence and refused.key == "flow_when"
