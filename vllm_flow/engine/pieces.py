"""Steps in which rows leave, through the pieces that vLLM has compiled.

vLLM cuts a compiled decoder at its attention: piece n runs from the attention of layer n - 1 to that of layer n, for
any number of rows. All that stands in a piece is done row by row, so it may be called with the rows that are
alive by then, and the layers' own code need not run. In the last layer that sees an image the piece before
its attention runs on all rows, so that all keys and values are stored, and the attention on those that stay.

Where vLLM has captured a piece in CUDA graphs, rows that fit into one are copied to where the graph reads, and the
rest of the step is replayed.

Seams: the callable that vLLM makes of each piece (``patches/pieces.py``), its arguments, of which the size that
follows the number of rows is learnt from calls of different size; ``forward`` of the attention's implementation, in a
last layer; ``cudagraph_runtime_mode`` and ``batch_descriptor`` of the forward context.

Legend: T rows of the step (with padding), R rows alive, H hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import weak_ref_tensor

from vllm_flow.engine.hiding import hidden
from vllm_flow.engine.settings import FlowSettings

if TYPE_CHECKING:
    from vllm_flow.engine.decoder import DeviceVariant, FlowStep

_CALL = "flow_leaving_call"
"""Attribute of vLLM's forward context: the call of the model that goes on, if rows leave in it."""

_made: dict[int, list[Piece]] = {}
"""Compilation config -> pieces, in the order in which they were compiled."""


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
        self._sizes: list[int] = list(backend.sym_shape_indices)
        self._seen: tuple[int, list[Any]] | None = None
        self.row_dims: dict[int, int] | None = None
        """Argument -> its dimension that counts rows; None before two calls of different size."""
        self.captured: dict[int, Captured] = {}
        """Rows -> graph."""
        if not backend.is_encoder_compilation:
            _made.setdefault(id(backend.compilation_config), []).append(self)

    def __call__(self, *args: Any) -> Any:
        if not is_forward_context_available():
            return self._run(*args)
        context = get_forward_context()
        call: LeavingCall | None = getattr(context, _CALL, None)
        if call is not None:
            return call.run(self, args)
        if self.row_dims is None and self._sizes:
            self._learn(args)
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            self._note_capture(context.batch_descriptor, args)
        return self._run(*args)

    def rows(self, args: Sequence[Any]) -> int:
        """Rows that a call is for."""
        return int(args[self._sizes[0]])

    def for_rows(self, num_rows: int, args: Sequence[Any]) -> Any:
        """Run it on tensors of so many rows."""
        given = list(args)
        for index in self._sizes:
            given[index] = num_rows
        return self._run(*given)

    def _learn(self, args: Sequence[Any]) -> None:
        now = (
            self.rows(args),
            [tuple(a.shape) if isinstance(a, torch.Tensor) else None for a in args],
        )
        if self._seen is None or self._seen[0] == now[0]:
            self._seen = now
            return
        self.row_dims = {}
        for index, shapes in enumerate(zip(self._seen[1], now[1], strict=True)):
            if None in shapes or shapes[0] == shapes[1]:
                continue
            differ = [
                d for d, sizes in enumerate(zip(*shapes, strict=True)) if sizes[0] != sizes[1]
            ]
            if len(differ) == 1 and shapes[1][differ[0]] == now[0]:
                self.row_dims[index] = differ[0]
            else:
                self._sizes = []  # more than rows changes: not to be called with others
        self._seen = None

    def _note_capture(self, descriptor: Any, args: Sequence[Any]) -> None:
        size = self.rows(args) if self._sizes else 0
        if size and size not in self.captured:
            inputs = [weak_ref_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            self.captured[size] = Captured(descriptor, inputs)

    @property
    def movable(self) -> bool:
        """Whether it may be called with fewer rows than the step has."""
        return bool(self._sizes) and self.row_dims is not None


def piece_of(run: Callable[..., Any], backend: Any) -> Piece:
    """What vLLM is to call in the place of a compiled piece; the same in an engine without the extension."""
    return run if FlowSettings.of(backend.vllm_config) is None else Piece(run, backend)


def pieces_of(compilation_config: Any, num_layers: int) -> list[Piece] | None:
    """A decoder's pieces, one more than it has layers; None where it was not cut at its attention alone."""
    found: dict[int, list[Piece]] = {}
    for piece in _made.get(id(compilation_config), ()):
        found.setdefault(id(piece.of), []).append(piece)
    fitting = [
        pieces for pieces in found.values() if len(pieces) == num_layers + 1 == pieces[0].count
    ]
    return fitting[0] if len(fitting) == 1 else None


@dataclass
class LeavingCall:
    """One call of the model in which rows leave."""

    step: FlowStep
    total: int = 0
    alive: torch.Tensor | None = None
    """[R] rows of the step; None while all are."""
    _count: int = 0
    """R."""
    _gathers: list[torch.Tensor] = field(default_factory=list)
    """Each turns the rows alive before into those alive after."""
    _pending: tuple[DeviceVariant, torch.Tensor] | None = None
    """What leaves behind the attention that runs next."""
    _since: dict[int, tuple[Any, int]] = field(default_factory=dict)
    """Tensor made by a piece -> (it, how many gathers were made before)."""
    _inputs: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)
    """Tensor that the model was called with -> its rows alive, and since which gather."""
    _first: dict[int, torch.Tensor] = field(default_factory=dict)
    """Tensor that the model was called with -> as it was."""
    _written: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _graph: Captured | None = None

    def run(self, piece: Piece, args: Sequence[Any]) -> Any:
        """A piece, on the rows that are alive behind the attention before it."""
        if piece.index == 0:
            self.total = self._count = piece.rows(args)
        leaves = self._leaves(piece.index)
        if leaves is not None:
            self._advance(*leaves)
        if not self._gathers:
            found = piece.for_rows(self.total, args)
        else:
            found = self._run_alive(piece, args, changed=leaves is not None)
        last = piece.index == piece.count - 1
        outputs = found if isinstance(found, tuple | list) else (found,)
        if last:
            whole = [self._whole(output) for output in outputs]
            return type(found)(whole) if isinstance(found, tuple | list) else whole[0]
        for output in outputs:
            if isinstance(output, torch.Tensor):
                self._since[id(output)] = (weakref.ref(output), len(self._gathers))
        return found

    def _leaves(self, layer: int) -> tuple[DeviceVariant, torch.Tensor] | None:
        """What leaves before the piece that ends in this layer's attention."""
        leaves, self._pending = self._pending, None
        variant = self.step.variants.get(layer)
        if variant is None or variant.gather is None:
            return leaves
        if variant.last is not None:
            self._pending = variant, variant.gather
            return leaves
        assert leaves is None, "rows leave behind a layer or before the next, not both"
        return variant, variant.gather

    def _advance(self, variant: DeviceVariant, gather: torch.Tensor) -> None:
        self._gathers.append(gather)
        self.alive, self._count = variant.rows, variant.num_rows

    def _run_alive(self, piece: Piece, args: Sequence[Any], changed: bool) -> Any:
        assert piece.row_dims is not None
        alive = {i: self._alive(args[i], dim) for i, dim in piece.row_dims.items()}
        if changed or self._graph is not None:
            self._graph = self._fitting(piece)
        context = get_forward_context()
        if self._graph is None:
            context.cudagraph_runtime_mode = CUDAGraphMode.NONE
            given = [alive.get(i, arg) for i, arg in enumerate(args)]
            return piece.for_rows(self._count, given)
        context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
        context.batch_descriptor = self._graph.descriptor
        given = list(args)
        for index, dim in piece.row_dims.items():
            place = self._graph.inputs[index]
            given[index] = place
            if alive[index].data_ptr() != place.data_ptr():
                self._put(place, alive[index], dim, kept=id(args[index]) in self._first)
        return piece.for_rows(piece.rows(self._graph.inputs), given)

    def _put(self, place: torch.Tensor, rows: torch.Tensor, dim: int, kept: bool) -> None:
        target = place.narrow(dim, 0, self._count)
        source = rows.narrow(dim, 0, self._count)
        if kept:  # where the runner keeps what it gives to the model
            self._written.append((target, target.clone()))
        target.copy_(source)

    def _alive(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The rows alive of an argument, whoever made it."""
        made = self._since.get(id(tensor))
        if made is not None and made[0]() is tensor:
            for gather in self._gathers[made[1] :]:
                tensor = tensor.index_select(dim, gather)
            return tensor
        known = self._inputs.get(id(tensor))
        if known is None or known[0] != len(self._gathers):
            assert self.alive is not None
            assert tensor.shape[dim] == self.total, (
                "what no piece has made, the model was called with"
            )
            source = self._first.setdefault(id(tensor), tensor.clone())
            known = len(self._gathers), source.index_select(dim, self.alive)
            self._inputs[id(tensor)] = known
        return known[1]

    def _fitting(self, piece: Piece) -> Captured | None:
        """The smallest graph that the rows fit into."""
        sizes = [size for size in piece.captured if size >= self._count]
        return piece.captured[min(sizes)] if sizes else None

    def _whole(self, output: Any) -> Any:
        if self.alive is None or not isinstance(output, torch.Tensor):
            return output
        # The sampler indexes the step's rows; those of evicted tokens are never sampled.
        whole_TH = output.new_zeros(self.total, *output.shape[1:])
        whole_TH[self.alive] = output[: self._count]
        return whole_TH

    def restore(self) -> None:
        """Give the runner's own tensors back what graphs were made to read in them."""
        for target, before in reversed(self._written):
            target.copy_(before)


class Pieces:
    """A decoder whose steps may lose rows in compiled code.

    Args:
        layers: the decoder's.
        compilation_config: vLLM's, by which its pieces are known.
    """

    def __init__(self, layers: Sequence[Any], compilation_config: Any) -> None:
        self._layers, self._config = layers, compilation_config
        self._pieces: list[Piece] | None = None

    def take(self, step: FlowStep) -> bool:
        """Whether this step can run through them."""
        if step.profiles or step.late or step.rankings:
            return False
        if any(variant.num_rows == 0 for variant in step.variants.values()):
            return False
        if self._pieces is None:
            self._pieces = pieces_of(self._config, len(self._layers))
        return self._pieces is not None and all(piece.movable for piece in self._pieces)

    @contextmanager
    def leaving(self, step: FlowStep) -> Iterator[LeavingCall]:
        """Let rows leave in the one call of the model that is made meanwhile."""
        last = [
            (self._layers[layer].self_attn.attn.impl, variant)
            for layer, variant in step.variants.items()
            if variant.last is not None
        ]
        attend = [(impl, _attending(impl.forward, variant)) for impl, variant in last]
        store = [(impl, _storing(impl.do_kv_cache_update, variant)) for impl, variant in last]
        context, call = get_forward_context(), LeavingCall(step)
        setattr(context, _CALL, call)
        try:
            with hidden("forward", attend), hidden("do_kv_cache_update", store):
                yield call
        finally:
            delattr(context, _CALL)
            call.restore()


def _storing(update: Callable[..., Any], variant: DeviceVariant) -> Callable[..., Any]:
    """An attention's ``do_kv_cache_update`` that stores all rows, those that stay and those of which only this is read."""
    stay, last = variant.gather, variant.last
    assert stay is not None and last is not None

    def run(
        layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: Any, slots: torch.Tensor
    ) -> None:
        rows = torch.cat((stay, last.gather))
        slots = torch.cat((slots[: len(stay)], last.slots))
        update(layer, key.index_select(0, rows), value.index_select(0, rows), kv_cache, slots)

    return run


def _attending(forward: Callable[..., Any], variant: DeviceVariant) -> Callable[..., Any]:
    """An attention's ``forward`` that computes the rows that stay, and leaves the others' output as it is."""
    gather = variant.gather
    assert gather is not None

    def run(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        staying = [tensor.index_select(0, gather) for tensor in (query, key, value)]
        found = output.new_empty(len(gather), *output.shape[1:])
        forward(layer, *staying, kv_cache, attn_metadata, output=found, **kwargs)
        output[gather] = found
        return output

    return run
