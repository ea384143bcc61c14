"""What is refused at start-up beside layers that keep a state per request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flow.engine import states


def config(method: str | None = None, v2: bool = False, hybrid: bool = True, **own: Any) -> Any:
    """What of a ``VllmConfig`` is looked at: drafts by a method, or none."""
    kinds = ["linear_attention"] * 3 + [states.ATTENTION]
    text = SimpleNamespace(layer_types=kinds, model_type="qwen3_5_text")
    return SimpleNamespace(
        model_config=SimpleNamespace(is_hybrid=hybrid, hf_text_config=text),
        speculative_config=None if method is None else SimpleNamespace(method=method),
        use_v2_model_runner=v2,
        **own,
    )


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "loses_drafts", lambda: False)


@pytest.mark.parametrize("method", [None, *states.DRAFTS])
def test_what_was_tested_is_served(method: str | None) -> None:
    assert states.attending(config().model_config) == (3,)
    assert states.reason_against(config(method)) is None


@pytest.mark.parametrize("method", ["eagle", "eagle3", "draft_model"])
def test_other_drafters_are_refused(method: str) -> None:
    assert "to 'ngram' or 'mtp', or leave it out" in (states.reason_against(config(method)) or "")
    assert states.reason_against(config(method, hybrid=False)) is None


@pytest.mark.parametrize("method", states.DRAFTS)
def test_drafts_are_refused_where_nobody_has_tried_them(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = states.reason_against(config(method, v2=True)) or ""
    assert "set VLLM_USE_V2_MODEL_RUNNER=0, or" in told
    monkeypatch.setattr(states, "loses_drafts", lambda: True)
    assert "on a CPU, where vLLM 0.32's convolutions" in (
        states.reason_against(config(method)) or ""
    )
    assert states.reason_against(config()) is None
