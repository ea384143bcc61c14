"""The Triton kernel of the attention log against its reference, through Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine import v2_cpu
from tests.engine.cases import GQA, adjacent_images, text_only, two_images
from tests.engine.harness import assert_exact
from tests.engine.span_cases import BATCHES, GROUPS, Heads, Row, make
from tests.engine.test_attention_log import assert_logged, logging_some, open_logging
from vllm_flow.engine.worker.attention import span_lse_triton
from vllm_flow.engine.worker.attention.keys import column_major, span_lse, tiled_pairs, token_major
from vllm_flow.engine.worker.attention.span_lse_triton import lse_function

__all__ = ["open_logging"]

# The logarithm of an empty span's sum, in the interpreter's numpy.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def assert_equal(case: Any) -> None:
    """The kernel's result is the reference's; empty spans included."""
    found = span_lse_triton.span_lse_triton(*case)
    expected = span_lse(*case)
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [*((heads, torch.float32) for heads in GROUPS), (GROUPS[1], torch.bfloat16)],
    ids=lambda value: str(value).replace("torch.", ""),
)
def test_the_kernel_is_the_reference(heads: Heads, dtype: torch.dtype) -> None:
    for seed, (name, rows) in enumerate(BATCHES.items()):
        for layer in (0, 1) if name == "evicted" else (0,):
            case = make(heads, rows, layer, dtype, "cpu", seed)
            assert_equal(case)
    *_, bounds, _ = case
    assert (bounds.diff() == 0).any(), "past the cliff an image's span is empty"


@pytest.mark.parametrize("part", [16, 48])
def test_long_spans_are_shared_out(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(span_lse_triton, "PART", part)
    assert_equal(make(GROUPS[1], BATCHES["two images"], 0, torch.float32, "cpu"))


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A request with up to two images anywhere in it."""
    cuts = sorted(draw(st.lists(st.integers(0, 50), min_size=4, max_size=4)))
    images = [(a, b) for a, b in (cuts[:2], cuts[2:]) if a < b]
    last = max([end for _, end in images], default=0)
    return Row(
        draw(st.integers(max(last, 1), last + 20)),
        tuple(images[: draw(st.integers(0, 2))]),
        draw(st.integers(0, 40)),
        draw(st.booleans()),
        draw(st.sampled_from((False, False, False, True))),
    )


@settings(deadline=None, max_examples=10)
@given(
    st.sampled_from(GROUPS), st.lists(rows(), min_size=1, max_size=2), st.integers(0, 1), st.data()
)
def test_any_batch(heads: Heads, batch: list[Row], layer: int, data: st.DataObject) -> None:
    heads = replace(heads, size=data.draw(st.sampled_from((64, 128))))
    assert_equal(make(heads, batch, layer, torch.float32, "cpu", data.draw(st.integers(0, 99))))


def test_large_logits_do_not_overflow() -> None:
    query, *rest = make(GROUPS[0], BATCHES["one image"], 0, torch.float32, "cpu")
    lse = span_lse_triton.span_lse_triton(100 * query, *rest)
    assert lse.isfinite().all()
    torch.testing.assert_close(lse, span_lse(100 * query, *rest), atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "device", "read", "triton_there", "runs"),
    [
        ("auto", CUDA, token_major, True, True),
        ("auto", CUDA, tiled_pairs, True, False),
        ("auto", CUDA, token_major, False, False),
        ("auto", CPU, column_major, True, False),
        ("torch", CUDA, token_major, True, False),
        ("triton", CUDA, token_major, True, True),
        ("triton", CPU, column_major, True, True),  # the interpreter's
    ],
)
def test_what_runs(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, device: Any, read: Any, triton_there: bool,
    runs: bool,
) -> None:  # fmt: skip
    told: list[str] = []
    monkeypatch.setattr(span_lse_triton.logger, "warning", lambda *said: told.append(str(said)))
    monkeypatch.setattr(span_lse_triton, "HAS_TRITON", triton_there)
    expected = span_lse_triton.span_lse_triton if runs else span_lse
    assert lse_function(kernel, device, read) is expected
    assert bool(told) == (not runs and kernel == "auto" and device is CUDA)


@pytest.mark.parametrize(
    ("device", "read", "triton_there", "interpreted", "says"),
    [
        (CUDA, token_major, False, True, "no Triton"),
        (CPU, token_major, True, False, "nothing for the device 'cpu'"),
        (CUDA, tiled_pairs, True, False, "as tiled_pairs"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: Any, read: Any, triton_there: bool, interpreted: bool,
    says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(span_lse_triton, "HAS_TRITON", triton_there)
    monkeypatch.setattr(span_lse_triton.triton.knobs.runtime, "interpret", interpreted)
    with pytest.raises(ValueError, match=f"attention_log_kernel='triton': .*{says}.*leave it out"):
        lse_function("triton", device, read)


def test_this_process_interprets() -> None:
    """Else the tests above would compare the kernel with nothing."""
    assert v2_cpu.wanted() and span_lse_triton.HAS_TRITON
    assert span_lse_triton.triton.knobs.runtime.interpret


def test_with_the_kernel_the_log_is_the_oracles_attention(
    open_logging: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine: chunks, packed slots, several images, the heat."""
    ran = []
    kernel = span_lse_triton.span_lse_triton
    monkeypatch.setattr(
        span_lse_triton, "span_lse_triton", lambda *case: ran.append(1) or kernel(*case)
    )
    logging = open_logging(GQA, 2, kernel="triton", max_num_batched_tokens=48, max_num_seqs=3)
    asks = [two_images(701, 2), text_only(702), adjacent_images(703, 1)]
    asks = logging_some(asks, GQA.layers, max_tokens=3)
    outputs = logging.engine.run(asks)
    assert_exact(logging.engine, asks, outputs)
    assert_logged(logging, asks, outputs)
    assert ran
