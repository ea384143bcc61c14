"""Attention masses by xformers' masks, materialised where there is no CUDA device, against the model's maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_flow.analysis import span_attention
from vllm_flow.analysis.attention_reference import Rows, attention_masses
from vllm_flow.analysis.vlm import Encoded, Vlm
from vllm_flow.engine.worker.attention import xformers_needs

ANSWER = [20, 33, 47]


def materialised(query: torch.Tensor, key: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    """xformers' op in torch: the mask as a matrix."""
    seen = mask.materialize((query.shape[1], key.shape[1])) == 0
    logits = torch.einsum("bpkgd,btkgd->bkgpt", query.double(), key.double()) * scale
    return logits.masked_fill(~seen, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("rows", ["predicting", "own"])
def test_masses_are_those_of_the_maps(
    tiny: Vlm, eager: Vlm, encoded: Encoded, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed (extra 'xformers')")
    monkeypatch.setattr(span_attention, "partial_lse", materialised)
    monkeypatch.setattr(xformers_needs, "MOST_PROGRAMS", 7)  # many launches
    found = span_attention.span_masses(tiny, encoded, ANSWER, rows)
    expected = attention_masses(eager, encoded, ANSWER, rows)
    for name in ("spans_LAS", "images_LAI", "heat_LAP", "flow_LSS"):
        own, other = getattr(found, name), getattr(expected, name)
        assert own.dtype == other.dtype and own.shape == other.shape
        np.testing.assert_allclose(own, other, atol=1e-6, err_msg=name)
    assert tiny.model.config.text_config._attn_implementation == "sdpa"


def test_the_model_is_as_before_where_it_fails(tiny: Vlm, encoded: Encoded) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), span_attention.taking(tiny, fail):
        tiny.forward(encoded, ANSWER)
    assert tiny.model.config.text_config._attn_implementation == "sdpa"
    tiny.forward(encoded, ANSWER)


def test_a_window_narrower_than_the_prompt_is_refused(
    tiny: Vlm, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.decoder.config, "sliding_window", 24, raising=False)
    with pytest.raises(ValueError, match="the last 24 tokens only, of 25 .*eager"):
        span_attention.span_masses(tiny, encoded, ANSWER)


def test_what_stands_against_it_is_said(
    tiny: Vlm, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xformers_needs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="eager.*xformers is not installed"):
        attention_masses(tiny, encoded, ANSWER)
    monkeypatch.setattr(xformers_needs, "find_spec", lambda name: object())
    monkeypatch.setattr(xformers_needs, "version", lambda name: "3.8.0")
    with pytest.raises(ValueError, match="the model is on cpu"):
        attention_masses(tiny, encoded, ANSWER)
    monkeypatch.setattr(Vlm, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="in float64, not in 16 bits"):
        attention_masses(tiny, encoded, ANSWER)
