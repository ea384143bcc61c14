"""Rows alive of what compiled pieces are called with: by who made a tensor, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.engine.worker.passes.piece_shapes import RowShapes
from vllm_flow.engine.worker.passes.piece_tensors import AliveTensors, GraphInputs


def maker(*last_readers: int) -> Any:
    """A piece with as many outputs, of [rows, 2] each; -1: nobody reads it."""
    shapes = RowShapes({}, {}, {index: 0 for index in range(len(last_readers))})
    readers = {index: last for index, last in enumerate(last_readers) if last >= 0}
    return SimpleNamespace(shapes=shapes, last_readers=readers)


@given(st.data())
def test_each_tensor_loses_what_left_since_it_was_made(data: st.DataObject) -> None:
    """Every row holds its number in the step, so what is left says which rows it has."""
    total, alive = 8, list(range(8))
    given_TD = torch.arange(total).repeat(2, 1).t().contiguous()
    tensors, made = AliveTensors(), []
    for piece in range(data.draw(st.integers(1, 4))):
        if alive and data.draw(st.booleans()):
            gather = sorted(data.draw(st.sets(st.integers(0, len(alive) - 1), min_size=1)))
            tensors.leave(torch.tensor(gather), before=piece)
            alive = [alive[row] for row in gather]
        new = torch.tensor(alive).repeat(2, 1).t().contiguous()
        made.append(new)
        tensors.note_made(maker(data.draw(st.integers(-1, 4))), new)
        if tensors.complete:
            continue
        for tensor in (given_TD, *made):
            found = tensors.alive(tensor, 0, torch.tensor(alive), total)
            assert found[:, 0].tolist() == alive
            again = tensors.alive(tensor, 0, torch.tensor(alive), total)
            assert again is found, "gathered once"


def test_what_later_pieces_read_is_gathered_before_graphs_run_over_it() -> None:
    tensors = AliveTensors()
    read, unread = torch.arange(4)[:, None].float(), torch.zeros(4, 1)
    tensors.note_made(maker(3, 0), (read, unread))
    tensors.leave(torch.tensor([1, 3]), before=1)
    read.fill_(torch.nan)
    assert tensors.alive(read, 0, torch.tensor([1, 3]), 4).flatten().tolist() == [1.0, 3.0]


def test_what_the_model_was_given_is_kept_as_it_was() -> None:
    """A graph may be made to read where it stands."""
    tensors, inputs = AliveTensors(), GraphInputs()
    buffer = torch.arange(6)
    tensors.leave(torch.tensor([0, 2, 5]), before=1)
    alive = tensors.alive(buffer, 0, torch.tensor([0, 2, 5]), 6)
    inputs.put(buffer[:4], alive, 0, 3, own=tensors.is_given(buffer))
    assert buffer.tolist() == [0, 2, 5, 3, 4, 5]
    tensors.leave(torch.tensor([0, 2]), before=2)
    alive = tensors.alive(buffer, 0, torch.tensor([0, 5]), 6)
    assert alive.tolist() == [0, 5]
    inputs.put(buffer[:2], alive, 0, 2, own=True)
    assert buffer.tolist() == [0, 5, 5, 3, 4, 5]
    inputs.restore()
    assert buffer.tolist() == list(range(6))


def test_rows_that_stand_where_a_graph_reads_are_not_copied() -> None:
    inputs, place = GraphInputs(), torch.zeros(4, 2)
    inputs.put(place, place, 0, 3, own=False)
    rows = torch.ones(8, 2)
    inputs.put(place, rows, 0, 3, own=False)
    assert place.sum().item() == 6
