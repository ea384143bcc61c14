"""The fleet's arithmetic: directions that must hold, and the identities between its columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.profile import scale
from vllm_flow.profile.dimensions import Workload
from vllm_flow.profile.scale import MODELS, Assumptions, fleet_row

SHAPE = MODELS["llava-1.5-7b"]


@given(st.integers(0, 31), st.integers(1, 18), st.integers(2, 400))
def test_a_lower_cliff_never_costs_more(cliff: int, images: int, out: int) -> None:
    work, given_ = Workload(64, 576 * images, out, images), Assumptions()
    low, high = (fleet_row(SHAPE, work, c, given_) for c in (cliff, cliff + 1))
    assert low.prefill_ms < high.prefill_ms
    assert low.kv_mib < high.kv_mib
    assert low.resident >= high.resident
    assert low.transfer_ms < high.transfer_ms
    assert low.dollars_per_million < high.dollars_per_million


@given(st.integers(0, 32), st.integers(1, 5))
def test_columns_agree(cliff: int, images: int) -> None:
    work, given_ = Workload(64, 576 * images, 64, images), Assumptions(dollars_per_hour=3.6)
    row = fleet_row(SHAPE, work, cliff, given_)
    # A prefill GPU sends one prompt per prefill.
    assert row.prefill_gbs * row.prefill_ms == pytest.approx(row.transfer_ms * given_.network_gbs)
    # One GPU's time goes to prefill and decode in the ratio of a fleet's GPUs.
    assert 1e3 / row.requests_per_s == pytest.approx(row.prefill_ms * (1 + row.decode_per_prefill))
    assert row.dollars_per_million * row.requests_per_s == pytest.approx(1e3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no request"):
        fleet_row(SHAPE, Workload(64, 576, 64), 32, Assumptions(memory_gb=12))
    with pytest.raises(ValueError, match="batch=0"):
        Assumptions(batch=0)


def test_the_document_has_the_commands_table(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/scale.md shows what the command prints, character by character."""
    from pathlib import Path

    assert scale.main([]) == 0
    document = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    missing = [line for line in printed if line not in document]
    assert not missing, f"docs/scale.md is out of date; it lacks: {missing[:2]}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cliffs", "22,x"], "'x' is no whole number"),
        (["--cliffs", "33"], "--cliffs: llava-1.5-7b has the layers 0 to 32"),
        (["--images", "0"], "whole numbers above 0"),
        (["--tflops", "nan"], "'nan' is no number above 0"),
        (["--batch", "1_0"], "'1_0' is no whole number"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scale.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err
