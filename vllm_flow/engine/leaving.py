"""Steps in which rows leave, through the pieces that vLLM has compiled.

Each piece is called with the rows that are alive by then, so the layers' own code need not run. In the last layer
that sees an image the piece before its attention runs on all rows, so that all keys and values are stored, and
the attention on those that stay.

Where vLLM has captured a piece in CUDA graphs, rows that fit into one are copied to where the graph reads, and the
rest of the step is replayed.

Seams: ``cudagraph_runtime_mode`` and ``batch_descriptor`` of vLLM's forward context; ``forward`` and
``do_kv_cache_update`` of the attention's implementation, in a last layer.

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
from vllm.forward_context import get_forward_context

from vllm_flow.engine.hiding import hidden
from vllm_flow.engine.last_layer import attention_of
from vllm_flow.engine.pieces import CALL, Captured, Piece, pieces_of

if TYPE_CHECKING:
    from vllm_flow.engine.device_step import DeviceVariant, FlowStep


@dataclass
class _Given:
    """A tensor that the model was called with."""

    tensor: torch.Tensor
    first: torch.Tensor
    """As it was: a graph may be made to read where it stands."""
    gathers: int = 0
    """How many were made before :attr:`rows`."""
    rows: torch.Tensor | None = None
    """Those alive."""


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
    _given: dict[int, _Given] = field(default_factory=dict)
    """By the tensor's id."""
    _written: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Where graphs read of the runner's own tensors, and what stood there."""
    _placed: dict[int, torch.Tensor] = field(default_factory=dict)
    """Address -> the rows of such a tensor that stand there now."""
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
            self._graph = piece.fitting(self._count)
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
                self._put(place, alive[index], dim, own=id(args[index]) in self._given)
        return piece.for_rows(piece.rows(self._graph.inputs), given)

    def _put(self, place: torch.Tensor, rows: torch.Tensor, dim: int, own: bool) -> None:
        """Copy rows to where a graph reads.

        Args:
            own: the runner keeps there what it gives to the model, and every piece reads the same.
        """
        target = place.narrow(dim, 0, self._count)
        if own:
            if self._placed.get(place.data_ptr()) is rows:
                return
            self._placed[place.data_ptr()] = rows
            self._written.append((target, target.clone()))
        target.copy_(rows.narrow(dim, 0, self._count))

    def _alive(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The rows alive of an argument, whoever made it."""
        made = self._since.get(id(tensor))
        if made is not None and made[0]() is tensor:
            for gather in self._gathers[made[1] :]:
                tensor = tensor.index_select(dim, gather)
            return tensor
        given = self._given.get(id(tensor))
        if given is None:
            assert tensor.shape[dim] == self.total, (
                "what no piece has made, the model was called with"
            )
            given = self._given[id(tensor)] = _Given(tensor, tensor.clone())
        if given.gathers != len(self._gathers):
            assert self.alive is not None
            given.gathers, given.rows = (
                len(self._gathers),
                given.first.index_select(dim, self.alive),
            )
        assert given.rows is not None
        return given.rows

    def _whole(self, output: Any) -> Any:
        if self.alive is None or not isinstance(output, torch.Tensor):
            return output
        return at_their_rows(output[: self._count], self.alive, self.total)

    def restore(self) -> None:
        """Give the runner's own tensors back what graphs were made to read in them."""
        for target, before in reversed(self._written):
            target.copy_(before)


def at_their_rows(hidden_RH: torch.Tensor, rows_R: torch.Tensor, num_rows: int) -> torch.Tensor:
    """What is left of a step's rows, where it stood among all T: the sampler indexes those. Others are zero,
    and never sampled: their tokens were evicted."""
    hidden_TH = hidden_RH.new_zeros(num_rows, *hidden_RH.shape[1:])
    hidden_TH[rows_R] = hidden_RH
    return hidden_TH


class Pieces:
    """A decoder whose steps may lose rows in compiled code.

    Args:
        layers: the decoder's.
        compilation_config: vLLM's, by which its pieces are known.
    """

    def __init__(self, layers: Sequence[Any], compilation_config: Any) -> None:
        self._config = compilation_config
        self._attentions = [attention_of(layer) for layer in layers]
        """vLLM's, by layer; None where latent vectors are stored, by another name."""
        self._pieces: list[Piece] | None = None

    def take(self, step: FlowStep) -> bool:
        """Whether this step can run through them."""
        if step.profiles or step.late or step.rankings:
            return False
        if any(variant.num_rows == 0 for variant in step.variants.values()):
            return False
        last = [layer for layer, variant in step.variants.items() if variant.last is not None]
        if any(self._attentions[layer] is None for layer in last):
            return False
        if self._pieces is None:
            self._pieces = pieces_of(self._config, len(self._attentions))
        return self._pieces is not None and all(piece.movable for piece in self._pieces)

    @contextmanager
    def leaving(self, step: FlowStep) -> Iterator[LeavingCall]:
        """Let rows leave in the one call of the model that is made meanwhile."""
        last = [
            (self._attentions[layer].impl, variant)
            for layer, variant in step.variants.items()
            if variant.last is not None
        ]
        attend = [(impl, _attending(impl.forward, variant)) for impl, variant in last]
        store = [(impl, _storing(impl.do_kv_cache_update, variant)) for impl, variant in last]
        context, call = get_forward_context(), LeavingCall(step)
        setattr(context, CALL, call)
        try:
            with hidden("forward", attend), hidden("do_kv_cache_update", store):
                yield call
        finally:
            delattr(context, CALL)
            call.restore()


def _storing(update: Callable[..., Any], variant: DeviceVariant) -> Callable[..., Any]:
    """An attention's ``do_kv_cache_update`` that stores those that stay and those of which it is all that is read."""
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
