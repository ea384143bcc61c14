"""Keeps what the latest finished requests took of the engine, for whoever looks into it afterwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_flow.block_counts import predict_blocks
from vllm_flow.engine.core.observers import Observer
from vllm_flow.engine.requests import image_spans
from vllm_flow.layout import TokenLayout

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_flow.engine.core.storage import FlowAttentionManager

KEPT = 4096
"""Finished requests that are remembered."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one finished request took of the engine."""

    cliff: int
    """Layers that saw the image whole; the number of layers for a request that evicted nothing."""
    prompt_tokens: int
    image_tokens: int
    computed_tokens: int
    """Tokens with keys and values when the request ended: prompt and all outputs but the last."""
    blocks: tuple[int, ...]
    """KV blocks held at the end, per storage group, shallowest first."""
    evicted: tuple[tuple[int, int], ...] = ()
    """Per stage its first layer and how many image tokens were gone from there on, at the end."""
    late: bool = False
    """Whether they left after the prefill, which had them all."""


class FootprintBook(Observer):
    """Takes a request's footprint while its blocks are still there."""

    def __init__(
        self,
        num_layers: int,
        layouts: Mapping[str, TokenLayout],
        managers: Sequence[FlowAttentionManager],
    ) -> None:
        self.latest: OrderedDict[str, Footprint] = OrderedDict()
        """By the engine's request id, oldest first."""
        self._num_layers = num_layers
        self._layouts = layouts
        self._managers = managers

    def freeing(self, request: Request) -> None:
        layout = self._layouts.get(request.request_id)
        computed = request.num_computed_tokens
        blocks = tuple(
            len(manager.req_to_blocks.get(request.request_id, ())) for manager in self._managers
        )
        if not computed and request.num_output_tokens:
            # Preempted while its last token was on its way: what it held until then.
            computed = request.num_tokens - 1
            starts = [manager.spec.first_layer for manager in self._managers]
            blocks = predict_blocks(computed, layout, starts, self._managers[0].block_size)
        evicted = () if layout is None else layout.evicted_tokens(computed)
        self.latest[request.request_id] = Footprint(
            cliff=next((layer for layer, gone in evicted if gone), self._num_layers),
            prompt_tokens=request.num_prompt_tokens,
            image_tokens=image_spans(request.mm_features).total,
            computed_tokens=computed,
            blocks=blocks,
            evicted=evicted,
            late=layout is not None and layout.late,
        )
        if len(self.latest) > KEPT:
            self.latest.popitem(last=False)
