"""The pieces that vLLM has compiled a decoder in, each of which may be called with fewer rows than a step has.

vLLM cuts a compiled decoder at its attention: piece n runs from the attention of layer n - 1 to that of layer n, for
any number of rows; of a pipeline's stage, counted from its first layer. All that stands in a piece is done row by row.
Who calls them so: ``compiled_pass.py``.

Seams: the callable that vLLM makes of each piece (``patches/pieces.py``) and its arguments, of which those that
follow the number of rows are learnt from two calls of different size (``piece_shapes.py``);
``concrete_cudagraph_entries`` of vLLM's ``CUDAGraphWrapper``, which says whether a call captures.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import weak_ref_tensor

from vllm_flow.engine import states
from vllm_flow.engine.refusals import shares_experts
from vllm_flow.engine.setting_values import CONFIG_KEY
from vllm_flow.engine.worker.passes.aux_hidden_states import reads_between_layers
from vllm_flow.engine.worker.passes.piece_shapes import Call, RowShapes, learn, outputs_of

PASS = "flow_compiled_pass"
"""Attribute of vLLM's forward context: who runs the pieces of this call of the model; missing where vLLM does."""

_makers: MutableMapping[torch.Tensor, tuple[Piece, int]] = WeakTensorKeyDictionary()
"""While pieces learn: which one made a tensor, as which of its outputs."""
_made: weakref.WeakSet[Piece] = weakref.WeakSet()
"""All there are: whoever holds a compiled decoder holds its pieces."""


@dataclass
class Captured:
    """A CUDA graph of a piece, and where it reads."""

    descriptor: Any
    """vLLM's key."""
    inputs: list[Any]
    """The arguments of the capture; tensors keep no memory alive."""


class Piece:
    """One compiled piece, as vLLM calls it.

    Args:
        run: what vLLM made of it.
        backend: its ``PiecewiseBackend``.
    """

    def __init__(self, run: Callable[..., Any], backend: Any) -> None:
        self._run = run
        self.runnable = backend
        """Where vLLM looks for what its wrappers wrap when it keeps compiled code for the next start."""
        self.index: int = backend.piecewise_compile_index
        self.count: int = backend.total_piecewise_compiles
        self.of = backend.vllm_backend
        self._symbols: tuple[int, ...] = tuple(backend.sym_shape_indices)
        """Arguments that are integers; by the first vLLM counts rows."""
        self._learns = bool(self._symbols)
        self._first: Call | None = None
        self.shapes: RowShapes | None = None
        """Where a call has its rows; None before two calls of different size, and where more changes than rows."""
        self.last_readers: dict[int, int] = {}
        """Output -> index of the last piece that reads it."""
        self._captured: dict[int, Captured] = {}
        """Rows -> graph, also of those that vLLM has thrown away."""
        if not backend.is_encoder_compilation:
            _made.add(self)

    def __call__(self, *args: Any) -> Any:
        if not is_forward_context_available():
            return self._run(*args)
        context = get_forward_context()
        compiled_pass = getattr(context, PASS, None)
        if compiled_pass is not None:
            return compiled_pass.run(self, args)
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            self._note_capture(context.batch_descriptor, args)
        found = self._run(*args)
        if self._learns:
            self._note_readers(args, found)
            self._learn(args, found)
        return found

    def rows(self, args: Sequence[Any]) -> int:
        """Rows that a call is for."""
        return int(args[self._symbols[0]])

    def for_rows(self, num_rows: int, args: Sequence[Any]) -> Any:
        """Run it on tensors of so many rows."""
        assert self.shapes is not None, "only what is movable is called so"
        given = list(args)
        for index, factor in self.shapes.integers.items():
            given[self._symbols[index]] = factor * num_rows
        return self._run(*given)

    def _learn(self, args: Sequence[Any], found: Any) -> None:
        now = Call.of(self.rows(args), self._symbols, args, found)
        if self._first is None or self._first.rows == now.rows:
            self._first = now
        else:
            self.shapes, self._learns = learn(self._first, now), False
            self._first = None

    def _note_readers(self, args: Sequence[Any], found: Any) -> None:
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg in _makers:
                maker, output = _makers[arg]
                maker.last_readers[output] = self.index
        for output, value in enumerate(outputs_of(found)):
            if isinstance(value, torch.Tensor):
                _makers[value] = self, output

    def _note_capture(self, descriptor: Any, args: Sequence[Any]) -> None:
        """Before a call that captures: vLLM may capture anew, when its first graphs have told it their size."""
        if self._symbols and not self._is_there(descriptor):
            inputs = [weak_ref_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            self._captured[self.rows(args)] = Captured(descriptor, inputs)

    def _is_there(self, descriptor: Any) -> bool:
        entry = getattr(self._run, "concrete_cudagraph_entries", {}).get(descriptor)
        return entry is not None and entry.cudagraph is not None

    def fitting(self, num_rows: int) -> Captured | None:
        """The smallest graph that so many rows fit into."""
        sizes = [
            size
            for size, graph in self._captured.items()
            if size >= num_rows and self._is_there(graph.descriptor)
        ]
        return self._captured[min(sizes)] if sizes else None

    @property
    def movable(self) -> bool:
        """Whether it may be called with fewer rows than the step has."""
        return self.shapes is not None


def compiles_in_pieces(vllm_config: Any) -> bool:
    """Whether vLLM cuts the decoder, and its pieces may be called with fewer rows.

    Not where adapters know a step's rows; where linear attention leaves something outside of its operators, or layers
    do not attend, neither of which was looked at; where EAGLE-3 reads of a layer what comes out of pieces before and
    after rows were fewer; and where other engines wait for pieces that have no rows.
    """
    return (
        vllm_config.compilation_config.mode.name == "VLLM_COMPILE"
        and vllm_config.lora_config is None
        and not shares_experts(vllm_config)
        and not states.attending(vllm_config.model_config)
        and not reads_between_layers(vllm_config)
    )


def piece_of(run: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """What vLLM is to call in the place of a compiled piece; the same in an engine without the extension."""
    options = backend.vllm_config.additional_config
    return Piece(run, backend) if isinstance(options, dict) and CONFIG_KEY in options else run


def pieces_of(compilation_config: Any, num_layers: int) -> list[Piece] | None:
    """A decoder's pieces, one more than it has layers; None where it was not cut at its attention alone."""
    found: dict[int, list[Piece]] = {}
    for piece in _made:
        if piece.runnable.compilation_config is compilation_config:
            found.setdefault(id(piece.of), []).append(piece)
    fitting = [
        pieces for pieces in found.values() if len(pieces) == num_layers + 1 == pieces[0].count
    ]
    return sorted(fitting[0], key=lambda piece: piece.index) if len(fitting) == 1 else None
