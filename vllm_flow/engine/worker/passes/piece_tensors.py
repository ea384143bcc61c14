"""What compiled pieces are called with in a pass in which rows leave: the rows alive of any tensor, and the
places that CUDA graphs read from.

Pure PyTorch. Who calls: ``compiled_pass.py``.

Legend: T rows of the step (with padding), R rows alive.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vllm_flow.engine.worker.passes.piece_shapes import gathered, laid_out, outputs_of

if TYPE_CHECKING:
    from vllm_flow.engine.worker.passes.pieces import Piece


@dataclass
class _Made:
    """What is known of a tensor that a piece made."""

    dim: int
    """Which counts rows."""
    last_reader: int
    """Index of the last piece that reads it."""
    num_gathers: int
    """How many :attr:`alive`, or the tensor itself, has been through."""
    alive: torch.Tensor | None = None
    """What is left of it; None where nothing has left since it was made."""


@dataclass
class _Given:
    """What is known of a tensor that the model was called with, of all T rows."""

    first: torch.Tensor
    """As it was: a graph may be made to read where it stands."""
    num_gathers: int = 0
    """After how many :attr:`alive` was gathered."""
    alive: torch.Tensor | None = None


class AliveTensors:
    """Gathers the rows alive of what pieces are called with, by what a tensor has been through already.

    A piece makes tensors of the rows that are alive when it runs, and they may be read by any later one; what the
    model was called with has all rows of the step, whoever reads it.
    """

    def __init__(self) -> None:
        self._gathers: list[torch.Tensor] = []
        """Each turns the rows alive before into those alive after."""
        self._made: MutableMapping[torch.Tensor, _Made] = WeakTensorKeyDictionary()
        self._given: MutableMapping[torch.Tensor, _Given] = WeakTensorKeyDictionary()

    @property
    def complete(self) -> bool:
        """Whether no row has left yet."""
        return not self._gathers

    def leave(self, gather_R: torch.Tensor, before: int) -> None:
        """Go on with these of the rows alive.

        What later pieces read is gathered now: graphs of other sizes, which the next pieces may run in, may have
        been captured over the memory that it stands in.

        Args:
            before: index of the piece that runs next.
        """
        self._gathers.append(gather_R)
        for tensor, made in list(self._made.items()):
            if made.last_reader >= before:
                self._catch_up(tensor, made)

    def note_made(self, piece: Piece, found: Any) -> None:
        """Know what a piece has just made: of the rows alive by now."""
        assert piece.shapes is not None
        for index, output in enumerate(outputs_of(found)):
            if isinstance(output, torch.Tensor):
                reader = piece.last_readers.get(index, -1)
                dim = piece.shapes.outputs[index]
                self._made[output] = _Made(dim, reader, len(self._gathers))

    def is_given(self, tensor: torch.Tensor) -> bool:
        """Whether the model was called with it."""
        return tensor in self._given

    def alive(
        self, tensor: torch.Tensor, dim: int, rows_R: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """The rows alive of an argument, whoever made it; behind them anything, where a graph made it.

        Args:
            dim: its dimension that counts rows.
            rows_R: rows of the step that are alive.
            num_rows: T.
        """
        made = self._made.get(tensor)
        if made is not None:
            return self._catch_up(tensor, made)
        given = self._given.get(tensor)
        if given is None:
            assert tensor.shape[dim] == num_rows, "what no piece has made, the model was given"
            given = self._given[tensor] = _Given(laid_out(tensor, tensor.stride()))
        if given.alive is None or given.num_gathers != len(self._gathers):
            given.alive = gathered(given.first, dim, rows_R)
            given.num_gathers = len(self._gathers)
        return given.alive

    def _catch_up(self, tensor: torch.Tensor, made: _Made) -> torch.Tensor:
        alive = tensor if made.alive is None else made.alive
        for gather in self._gathers[made.num_gathers :]:
            alive = made.alive = gathered(alive, made.dim, gather)
        made.num_gathers = len(self._gathers)
        return alive


@dataclass
class GraphInputs:
    """Copies rows to where CUDA graphs read, and puts back what stood in the runner's own tensors."""

    _written: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Parts of the runner's tensors, and what stood there."""
    _placed: dict[int, torch.Tensor] = field(default_factory=dict)
    """Address of such a tensor -> the rows that stand there now."""

    def put(
        self, place: torch.Tensor, tensor: torch.Tensor, dim: int, num_rows: int, own: bool
    ) -> None:
        """Copy R rows to the front of a graph's input; nothing if they stand there.

        Args:
            tensor: has them in front; behind them anything, where a graph made it.
            dim: the dimension of both that counts rows.
            num_rows: R.
            own: whether the runner keeps there what it gives to the model: every piece reads the same.
        """
        if tensor.data_ptr() == place.data_ptr():
            return
        target = place.narrow(dim, 0, num_rows)
        if own:
            if self._placed.get(place.data_ptr()) is tensor:
                return
            self._placed[place.data_ptr()] = tensor
            self._written.append((target, target.clone()))
        target.copy_(tensor.narrow(dim, 0, num_rows))

    def restore(self) -> None:
        """Give the runner's own tensors back what they held."""
        for target, before in reversed(self._written):
            target.copy_(before)
