"""KV connectors serve requests without a policy; those that evict are kept away from most of them.

A connector assumes that block ``i`` of a request holds the tokens from ``i * block_size`` on, which is not true of
packed blocks. So it never hears of a request that evicts: it is not asked for cached tokens, is given no blocks and
sees no step of it. One thing it is told: which blocks such a request takes. A connector may still be storing the blocks
of a finished request while the engine goes on, and must be done with a block before another request writes it.

A connector that sends a request's blocks to another engine (prefill and decode in different engines) need not know what
they hold: block ``i`` of a storage group is block ``i`` of the same group there. If its class says so (:data:`PACKED`),
or it is one of vLLM's that was tried (:data:`TRIED`), requests that evict are handed over like others. With them goes
the name of their layout, which the receiving front end compares with its own. This is off where layers keep a state
per request.

Seam: ``Scheduler.connector``, on which vLLM calls the scheduler's half of a connector's methods. The
workers' half acts on what that half sends along.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.request import Request

    from vllm_flow.layout import TokenLayout


PACKED = "flow_packed_blocks"
"""Attribute of a connector's class, true where it pairs the blocks of a request with ``kv_transfer_params`` by
storage group and place alone, counts no tokens in them, and loads them whole, no local prefix before them."""
TRIED = ("NixlPullConnector",)
"""Classes of vLLM's own that do so: NIXL, which ``NixlConnector`` names, too."""
LAYOUT_KEY = "vllm_flow_layout"
"""In ``kv_transfer_params`` that a connector returns with a request: the name of its layout."""
REMOTE_PREFILL = "do_remote_prefill"
"""In those that a request brings, by vLLM's convention: another engine computed the prompt."""
REMOTE_BLOCKS = "remote_block_ids"
"""In them as well: blocks of another engine. Without the above, those of an earlier turn's decode, which a prefill
reads back as so many tokens."""


def hands_over(transfer: KVTransferConfig | None) -> bool:
    """Whether an engine's connector takes requests that evict, too."""
    if transfer is None or transfer.kv_connector is None:
        return False
    return packs(KVConnectorFactory.get_connector_class(transfer))


def packs(connector: type) -> bool:
    """Whether a connector's class pairs packed blocks: it says so, or is one of vLLM's that was tried."""
    tried = any(base.__name__ in TRIED for base in connector.__mro__)
    return bool(getattr(connector, PACKED, tried))


def comes_from_elsewhere(request: Request) -> bool:
    """Whether another engine computed the request's prompt."""
    return bool((request.kv_transfer_params or {}).get(REMOTE_PREFILL))


class FlowConnector(KVConnectorBase_V1):
    """Mixed in before a connector's own class by :func:`vllm_flow.engine.adoption.adopt`."""

    flow_layouts: Mapping[str, TokenLayout]
    """The scheduler's live mapping from request id to layout."""
    flow_group_layers: int
    flow_hands_over: bool
    """Whether requests with a layout may be handed over."""
    flow_handed: set[str]
    """Requests with a layout that are handed over."""

    def _evicts(self, request: Request) -> bool:
        """Whether the request is kept away."""
        request_id = request.request_id
        return request_id in self.flow_layouts and request_id not in self.flow_handed

    def on_new_request(self, request: Request) -> None:
        asks = request.kv_transfer_params and self.flow_hands_over
        if asks and request.request_id in self.flow_layouts:
            self.flow_handed.add(request.request_id)
        if not self._evicts(request):
            super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._evicts(request):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)  # type: ignore[safe-super]

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        if not self._evicts(request):
            super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[safe-super]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        gone = [
            request_id
            for request_id in scheduler_output.num_scheduled_tokens
            if request_id in self.flow_layouts and request_id not in self.flow_handed
        ]
        if not gone:
            return super().build_connector_meta(scheduler_output)  # type: ignore[safe-super]
        shown = without(scheduler_output, gone)
        meta = super().build_connector_meta(shown)  # type: ignore[safe-super]
        # The one field that a connector may change: blocks that it fills need no zeros.
        scheduler_output.new_block_ids_to_zero = shown.new_block_ids_to_zero
        return meta

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._evicts(request):
            return False, None
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._evicts(request):
            return False, None
        finished: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(  # type: ignore[misc]
            request, block_ids
        )
        if request.request_id not in self.flow_handed:
            return finished
        self.flow_handed.discard(request.request_id)
        delays, params = finished
        if params is not None:
            layout = self.flow_layouts[request.request_id]
            params = {**params, LAYOUT_KEY: layout.fingerprint(self.flow_group_layers)}
        return delays, params

    def register_finished_partial_tail(
        self, request: Request, block_ids: tuple[list[int], ...], *args: Any, **kwargs: Any
    ) -> bool:
        if self._evicts(request):
            return False
        return super().register_finished_partial_tail(request, block_ids, *args, **kwargs)


def without(output: SchedulerOutput, gone: Collection[str]) -> SchedulerOutput:
    """A step's output as if some requests were not in it; the original stays as it is.

    Which requests have *finished* stays: a connector must know those that it never saw, too. So do the blocks
    that these requests took, which lose what they held: as copies of themselves, since of a copy a connector
    knows that it overwrites a block, whoever the block is for.
    """
    copies = list(output.kv_cache_block_copies or ())
    copies += [KVCacheBlockCopy(block, block) for block in _taken(output, gone)]
    scheduled = _others(output.num_scheduled_tokens, gone)
    state = output.kv_connector_block_state
    if state is not None:
        state = replace(
            state,
            req_ids=state.req_ids - set(gone),
            boundary_state_offloads=_others(state.boundary_state_offloads, gone),
        )
    return replace(
        output,
        scheduled_new_reqs=[new for new in output.scheduled_new_reqs if new.req_id not in gone],
        scheduled_cached_reqs=_cached_without(output.scheduled_cached_reqs, gone),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens=_others(output.scheduled_spec_decode_tokens, gone),
        scheduled_encoder_inputs=_others(output.scheduled_encoder_inputs, gone),
        kv_connector_block_state=state,
        kv_cache_block_copies=copies or None,
    )


def _taken(output: SchedulerOutput, requests: Collection[str]) -> list[int]:
    """Blocks that some requests were given for this step, and those that they share with others."""
    cached = output.scheduled_cached_reqs
    new = [request.block_ids for request in output.scheduled_new_reqs if request.req_id in requests]
    more = [
        blocks
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True)
        if request_id in requests and blocks is not None
    ]
    return [block for groups in (*new, *more) for group in groups for block in group]


def _cached_without(cached: CachedRequestData, gone: Collection[str]) -> CachedRequestData:
    stays = [index for index, request_id in enumerate(cached.req_ids) if request_id not in gone]

    def left(values: list[Any]) -> list[Any]:
        return [values[index] for index in stays] if values else values

    return replace(
        cached,
        req_ids=left(cached.req_ids),
        resumed_req_ids=cached.resumed_req_ids - set(gone),
        new_token_ids=left(cached.new_token_ids),
        all_token_ids=_others(cached.all_token_ids, gone),
        new_block_ids=left(cached.new_block_ids),
        num_computed_tokens=left(cached.num_computed_tokens),
        num_output_tokens=left(cached.num_output_tokens),
    )


def _others(values: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    return {request_id: value for request_id, value in values.items() if request_id not in gone}
