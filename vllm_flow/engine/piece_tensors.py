"""What compiled pieces are called with in a pass in which rows leave: the rows alive of any tensor, and the
places that CUDA graphs read from.

Pure PyTorch. Who calls: ``compiled_pass.py``.

Legend: T rows of the step (with padding), R rows alive.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class _Given:
    """A tensor that the model was called with, of all T rows."""

    tensor: torch.Tensor
    """Keeps its id from being another's."""
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
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        """By id: tensors that pieces made, and how many gathers came before."""
        self._given: dict[int, _Given] = {}
        """By id: tensors that the model was called with."""

    @property
    def complete(self) -> bool:
        """Whether no row has left yet."""
        return not self._gathers

    def leave(self, gather_R: torch.Tensor) -> None:
        """Go on with these of the rows alive."""
        self._gathers.append(gather_R)

    def note_made(self, outputs: tuple[Any, ...] | list[Any]) -> None:
        """Know what a piece has just made: of the rows alive by now."""
        for output in outputs:
            if isinstance(output, torch.Tensor):
                self._made[id(output)] = weakref.ref(output), len(self._gathers)

    def is_given(self, tensor: torch.Tensor) -> bool:
        """Whether the model was called with it."""
        return id(tensor) in self._given

    def alive(
        self, tensor: torch.Tensor, dim: int, rows_R: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """The rows alive of an argument, whoever made it; behind them anything, where a graph made it.

        Args:
            dim: its dimension that counts rows.
            rows_R: rows of the step that are alive.
            num_rows: T.
        """
        made = self._made.get(id(tensor))
        if made is not None and made[0]() is tensor:
            for gather in self._gathers[made[1] :]:
                tensor = tensor.index_select(dim, gather)
            return tensor
        given = self._given.get(id(tensor))
        if given is None:
            assert tensor.shape[dim] == num_rows, "what no piece has made, the model was given"
            given = self._given[id(tensor)] = _Given(tensor, tensor.clone())
        if given.alive is None or given.num_gathers != len(self._gathers):
            given.alive = given.first.index_select(dim, rows_R)
            given.num_gathers = len(self._gathers)
        return given.alive


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
