"""xformers' own kernel through Triton's interpreter, on paged keys in every layout, against the torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.engine.span_cases import BATCHES, GROUPS, Heads, Row, make
from tests.engine.xformers_masks import xformers_or_skip
from vllm_flow.engine.worker.attention import span_lse_xformers, xformers_needs
from vllm_flow.engine.worker.attention.keys import span_lse, token_major

# The logarithm of an empty span's sum, in the interpreter's numpy.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

HEADS = [replace(heads, size=64) for heads in GROUPS if heads.read is token_major]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """xformers loads its kernel without a device, and its op takes tensors that lie on the CPU."""
    xformers_or_skip()
    if (lacking := xformers_needs.missing()) is not None:
        pytest.skip(lacking)
    monkeypatch.setenv("XFORMERS_ENABLE_TRITON", "1")
    from xformers.ops.fmha.triton_splitk import FwOp

    monkeypatch.setattr(FwOp, "SUPPORTED_DEVICES", {"cpu"})
    FwOp.get_operator.cache_clear()
    yield
    FwOp.get_operator.cache_clear()


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_its_kernel_is_the_reference(heads: Heads) -> None:
    batches = {"long": [Row(300, ((35, 211),), answered=20)], **BATCHES}
    for seed, (name, rows) in enumerate(batches.items()):
        for layer in (0, 1) if name == "evicted" else (0,):
            case = make(heads, rows, layer, torch.float16, "cpu", seed)
            found, expected = span_lse_xformers.span_lse_xformers(*case), span_lse(*case)
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
