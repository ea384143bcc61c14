"""One pass through the pieces that vLLM has compiled a decoder in, in which rows leave.

Each piece is called with the rows that are alive by then, so the layers' own code need not run. In the last layer
that sees an image the piece before its attention runs on all rows, so that all keys and values are stored, and
the attention on those that stay (``compiled_decoder.py``).

Where vLLM has captured a piece in CUDA graphs, rows that fit into one are copied to where the graph reads, and the
rest of the step is replayed.

Seams: ``cudagraph_runtime_mode`` and ``batch_descriptor`` of vLLM's forward context.

Legend: T rows of the step (with padding), R rows alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_flow.engine.worker.passes.calls import at_their_rows
from vllm_flow.engine.worker.passes.piece_shapes import outputs_of
from vllm_flow.engine.worker.passes.piece_tensors import AliveTensors, GraphInputs

if TYPE_CHECKING:
    from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
    from vllm_flow.engine.worker.passes.pieces import Captured, Piece


class CompiledPass:
    """Which rows are alive, from piece to piece of one call of the model.

    Args:
        step: what leaves where.
        first_layer: in whose attention the first piece ends.
    """

    def __init__(self, step: DeviceStep, first_layer: int = 0) -> None:
        self._step, self._first_layer = step, first_layer
        self._total = 0
        """T."""
        self._count = 0
        """R."""
        self._tensors, self._inputs = AliveTensors(), GraphInputs()
        self._behind: DeviceVariant | None = None
        """What leaves behind the attention that runs next."""
        self._graph: Captured | None = None
        self.rows: torch.Tensor | None = None
        """[R] rows of the step that are alive; None while all are."""

    def run(self, piece: Piece, args: Sequence[Any]) -> Any:
        """A piece, on the rows that are alive behind the attention before it."""
        if piece.index == 0:
            self._total = self._count = piece.rows(args)
        variant = self._leaving_before(self._first_layer + piece.index)
        if variant is not None:
            assert variant.gather is not None
            self._tensors.leave(variant.gather, piece.index)
            self.rows, self._count = variant.rows, variant.num_rows
        if self._tensors.complete:
            found = piece.for_rows(self._total, args)
        else:
            found = self._run_alive(piece, args, changed=variant is not None)
        if piece.index < piece.count - 1:
            self._tensors.note_made(piece, found)
            return found
        assert piece.shapes is not None
        whole = [
            self._whole(output, piece.shapes.outputs.get(index))
            for index, output in enumerate(outputs_of(found))
        ]
        return type(found)(whole) if isinstance(found, tuple | list) else whole[0]

    def restore(self) -> None:
        """Give the runner's own tensors back what graphs were made to read in them."""
        self._inputs.restore()

    def _leaving_before(self, layer: int) -> DeviceVariant | None:
        """What leaves before the piece that ends in this layer's attention."""
        leaves, self._behind = self._behind, None
        variant = self._step.variants.get(layer)
        if variant is None or variant.gather is None:
            return leaves
        if variant.last is not None:
            self._behind = variant
            return leaves
        assert leaves is None, "rows leave behind a layer or before the next, not both"
        return variant

    def _run_alive(self, piece: Piece, args: Sequence[Any], changed: bool) -> Any:
        assert piece.shapes is not None and self.rows is not None
        alive = {
            index: self._tensors.alive(args[index], dim, self.rows, self._total)
            for index, dim in piece.shapes.args.items()
        }
        if changed or self._graph is not None:
            self._graph = piece.fitting(self._count)
        context, given = get_forward_context(), list(args)
        if self._graph is None:
            context.cudagraph_runtime_mode = CUDAGraphMode.NONE
            for index, dim in piece.shapes.args.items():
                given[index] = alive[index].narrow(dim, 0, self._count)
            return piece.for_rows(self._count, given)
        context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
        context.batch_descriptor = self._graph.descriptor
        for index, dim in piece.shapes.args.items():
            place = given[index] = self._graph.inputs[index]
            own = self._tensors.is_given(args[index])
            self._inputs.put(place, alive[index], dim, self._count, own)
        return piece.for_rows(piece.rows(self._graph.inputs), given)

    def _whole(self, output: Any, dim: int | None) -> Any:
        """An output of the last piece, its rows where they were in the step."""
        if self.rows is None or dim is None:
            return output
        alive = output.narrow(dim, 0, self._count).movedim(dim, 0)
        return at_their_rows(alive, self.rows, self._total).movedim(0, dim)
