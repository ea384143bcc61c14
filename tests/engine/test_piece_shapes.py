"""What follows the rows of a compiled piece's call, and tensors of fewer rows that compiled code can read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.engine.worker.passes.piece_shapes import Call, gathered, learn

ROWS, LONGER = (8, 5), 21


def call(rows: int, *tensors: torch.Tensor, integers: tuple[int, ...] = ()) -> Call:
    """Of a piece whose first arguments are integers, the number of rows in front; what it returns is the first
    tensor."""
    symbols = (rows, *integers)
    args = (*symbols, *tensors)
    return Call.of(rows, range(len(symbols)), args, tensors[0])


def slices(rows: int) -> torch.Tensor:
    """M-RoPE's positions: the front of a longer buffer."""
    return torch.arange(3 * LONGER).view(3, LONGER)[:, :rows]


def test_a_stride_is_none_of_the_rows() -> None:
    calls = [call(n, torch.zeros(n, 2), slices(n), integers=(LONGER, 4 * n)) for n in ROWS]
    found = learn(*calls)
    assert found is not None
    assert found.integers == {0: 1, 2: 4}
    assert found.args == {3: 0, 4: 1} and found.outputs == {0: 0}


def test_rows_may_stand_behind_a_batch() -> None:
    found = learn(*(call(n, torch.zeros(1, n, 4)) for n in ROWS))
    assert found is not None and found.args == {1: 1} and found.outputs == {0: 1}


@pytest.mark.parametrize(
    "of",
    [
        lambda n: call(n, torch.zeros(n, 2), integers=(2 * n + 1,)),
        lambda n: call(n, torch.zeros(n, 2), torch.zeros(2 * n)),
        lambda n: call(n, torch.zeros(n, 2), torch.zeros(n, n)),
        lambda n: call(n, torch.zeros(4, 2 * n)[:, :n].t()),
        lambda n: call(n, torch.zeros(4)),
    ],
    ids=["an integer", "another size", "two sizes", "strides", "an output of no rows"],
)
def test_where_more_than_rows_changes_nothing_is_learnt(of: object) -> None:
    assert callable(of)
    assert learn(*map(of, ROWS)) is None


@given(st.data())
def test_gathered_rows_are_laid_out_as_all_are(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 6))
    whole = torch.randn(3, rows + data.draw(st.integers(0, 3)), 2)[:, :rows]
    dim = data.draw(st.sampled_from([0, 1, 2]))
    size = whole.shape[dim]
    chosen = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    found = gathered(whole, dim, chosen)
    assert torch.equal(found, whole.index_select(dim, chosen))
    if whole.is_contiguous():
        assert found.is_contiguous()
    else:
        assert found.stride() == whole.stride()
