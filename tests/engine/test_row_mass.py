"""What several rows attend to, beside each of them asked alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.engine.worker.attention import row_mass
from vllm_flow.engine.worker.attention.keys import token_major

SLOTS, SIZE = 4, 8


@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99), st.data())
def test_several_rows_are_the_mean_of_each(
    visible: int, kv_heads: int, groups: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, visible))
    made = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(8, generator=made)[: -(-visible // SLOTS) + 1]
    attention = SimpleNamespace(
        kv_cache=torch.randn(8, kv_heads, SLOTS, 2 * SIZE, generator=made),
        head_size=SIZE,
        impl=SimpleNamespace(scale=0.4),
    )
    rows = torch.randn(count, kv_heads * groups * SIZE, generator=made)
    weights = torch.rand(count, generator=made) if data.draw(st.booleans()) else None
    expected = torch.zeros(visible)
    for row in range(count):
        seen = visible - count + 1 + row
        alone = row_mass.mass(attention, token_major, rows[row], blocks, seen)
        expected[:seen] += alone * (1 if weights is None else weights[row])
    expected /= count if weights is None else weights.sum()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(row_mass, "LOGITS_AT_ONCE", data.draw(st.integers(1, 400)))
        found = row_mass.mass_of_rows(attention, token_major, rows, blocks, visible, weights)
    assert torch.allclose(found, expected, atol=1e-6)
