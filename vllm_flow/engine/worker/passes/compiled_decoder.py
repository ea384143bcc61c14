"""A decoder that vLLM has compiled in pieces, through which steps may lose rows: which steps do, and what its
attention does meanwhile.

Seams: ``forward`` and ``do_kv_cache_update`` of the attention's implementation, in a last layer that sees an image;
an attribute of vLLM's forward context, by which pieces know of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import get_forward_context

from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.passes.compiled_pass import CompiledPass
from vllm_flow.engine.worker.passes.last_layer import attention_of
from vllm_flow.engine.worker.passes.pieces import PASS, Piece, pieces_of

if TYPE_CHECKING:
    from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant


class CompiledDecoder:
    """A decoder whose steps may lose rows in compiled code.

    Args:
        layers: those that this worker has.
        compilation_config: vLLM's, by which its pieces are known.
        first_layer: number of the first of them, of which a pipeline's earlier stages have others.
    """

    def __init__(
        self, layers: Sequence[Any], compilation_config: Any, first_layer: int = 0
    ) -> None:
        self._config, self._first_layer = compilation_config, first_layer
        self._attentions = {
            first_layer + index: attention_of(layer) for index, layer in enumerate(layers)
        }
        """vLLM's, by layer; None where latent vectors are stored, by another name."""
        self._pieces: list[Piece] | None = None

    def takes(self, step: DeviceStep) -> bool:
        """Whether this step can run through them."""
        if step.profiles or step.late or step.later or step.rankings:
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
    def leaving(self, step: DeviceStep) -> Iterator[CompiledPass]:
        """Let rows leave in the one call of the model that is made meanwhile."""
        last = [
            (self._attentions[layer].impl, variant)
            for layer, variant in step.variants.items()
            if variant.last is not None
        ]
        attend = [(impl, _attending(impl.forward, variant)) for impl, variant in last]
        store = [(impl, _storing(impl.do_kv_cache_update, variant)) for impl, variant in last]
        context, compiled = get_forward_context(), CompiledPass(step, self._first_layer)
        setattr(context, PASS, compiled)
        try:
            with replaced("forward", attend), replaced("do_kv_cache_update", store):
                yield compiled
        finally:
            delattr(context, PASS)
            compiled.restore()


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
