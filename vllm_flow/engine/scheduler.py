"""The scheduler that knows each request's layout before its first block is allocated.

Seam: ``SchedulerConfig.scheduler_cls``. Two classes, since vLLM keeps async scheduling in a
subclass of its own. Registers and forgets layouts, reports what they saved, and hands the attention
of tokens that became part of an answer to the log. The one scheduling decision that is ours: a
request waits a step where a request of its policy is computing its prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from vllm import envs
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from vllm_flow.attention import TokenAttention
from vllm_flow.engine import adoption, encoder_cache, events, groups, metrics
from vllm_flow.engine.attention.tap import OUTPUT_FIELD
from vllm_flow.engine.attention.writer import AttentionLogWriter
from vllm_flow.engine.inspect import Footprint
from vllm_flow.engine.prefix import FlowKVCacheManager
from vllm_flow.engine.requests import LayoutBook, image_spans, requested_log
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.storage import managers_of
from vllm_flow.engine.support import check_hash_unit

FOOTPRINTS_KEPT = 4096
"""Finished requests whose footprint is remembered for :func:`vllm_flow.engine.inspect.footprints`."""


class _FlowScheduling:
    """What both schedulers add to vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        groups.register()
        super().__init__(*args, **kwargs)
        settings = FlowSettings.of(self.vllm_config)
        assert settings is not None, "this scheduler class is set by vLLM-Flow's configuration"
        self.flow_settings = settings
        self.flow_requests = LayoutBook(settings.num_layers)
        self.flow_footprints: OrderedDict[str, Footprint] = OrderedDict()
        self.flow_managers = managers_of(self.kv_cache_manager.coordinator.single_type_managers)
        check_hash_unit(self.hash_block_size, [m.block_size for m in self.flow_managers])
        self.flow_in_flight: set[BlockHash] = set()
        for manager in self.flow_managers:
            manager.use_layouts(self.flow_requests.layouts, self.flow_in_flight)
        events.tell(self.kv_cache_manager.block_pool)
        adoption.adopt(self.kv_cache_manager, FlowKVCacheManager)
        self.kv_cache_manager.flow_layouts = self.flow_requests.layouts
        self.kv_cache_manager.flow_managers = self.flow_managers
        self.kv_cache_manager.flow_in_flight = self.flow_in_flight
        # Of the step being scheduled: encoder outputs, by the picture's hash.
        self.flow_booked: dict[str, encoder_cache.Booking] = {}
        # A block is spread over the workers of a tensor-parallel group, each with its heads.
        self.flow_geometry = metrics.Geometry(
            settings.num_layers,
            settings.group_starts,
            self.flow_managers[0].block_size,
            self.flow_managers[0].spec.page_size_bytes
            * settings.group_layers
            * self.vllm_config.parallel_config.tensor_parallel_size,
        )
        self.flow_log: AttentionLogWriter | None = None
        # Of the step being processed: what may become part of an answer.
        self.flow_attention: dict[str, tuple[Request, TokenAttention]] = {}
        self.flow_logged: dict[str, int] = {}  # of live requests that log: rows handed over
        if settings.attention_log is not None:
            self.flow_log = AttentionLogWriter(
                settings.attention_log, settings.attention_log_max_bytes
            )

    def add_request(self, request: Request) -> None:
        self.flow_requests.add(request.request_id, request.sampling_params, request.mm_features)
        if self.flow_log is not None and requested_log(request, self.flow_settings.num_layers):
            self.flow_logged[request.request_id] = 0
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.flow_in_flight.clear()
        self.flow_booked.clear()
        output = super().schedule(*args, **kwargs)
        encoder_cache.settle(
            output,
            self.flow_booked,
            self.encoder_cache_manager,
            self.requests,
            with_pictures=not self.use_v2_model_runner,
        )
        return output

    def _allocate_encoder_inputs(
        self, request: Request, input_ids: list[int], *args: Any, **kwargs: Any
    ) -> None:
        super()._allocate_encoder_inputs(request, input_ids, *args, **kwargs)
        for index in input_ids:
            self.flow_booked[request.mm_features[index].identifier] = encoder_cache.Booking(
                request.request_id, index
            )

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be scheduled in this step.

        It waits while a longer part of its prompt is being computed for another request. That
        lasts as long as the other one advances, and then saves computing it a second time.
        """
        if not super()._handle_blocked_waiting_request(request):
            return False
        return not self.kv_cache_manager.has_prefix_in_flight(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        result = self._update_and_log(scheduler_output, model_runner_output)
        if self.flow_requests.layouts or self.flow_logged:
            for outputs in result.values():
                self._outline(outputs.outputs)
        return result

    def _outline(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Give first outputs what the front end needs to report on a request it ends itself."""
        for output in outputs:
            if output.prefill_stats is None or output.finish_reason is not None:
                continue
            request = self.requests.get(output.request_id)
            layout = self.flow_requests.layouts.get(output.request_id)
            logs = output.request_id in self.flow_logged
            if request is None or not (layout or logs):
                continue
            log = requested_log(request, self.flow_settings.num_layers) if logs else None
            found = metrics.outline(self.flow_geometry, layout, len(log.layers) if log else 0)
            output.kv_transfer_params = {
                **(output.kv_transfer_params or {}),
                metrics.REPORT_KEY: found,
            }

    def _update_and_log(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if self.flow_log is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        # Recomputing a preempted request repeats rows of tokens that it has long had.
        self.flow_attention = {
            request_id: (request, found)
            for request_id, found in getattr(model_runner_output, OUTPUT_FIELD, {}).items()
            if (request := self.requests.get(request_id)) is not None
            and found.token == request.num_output_tokens
        }
        result = super().update_from_output(scheduler_output, model_runner_output)
        for request_id in list(self.flow_attention):
            self._log_token(request_id)
        return result

    def _log_token(self, request_id: str) -> None:
        """Log the step's token of a request if it became part of the answer.

        It did not where the step came too late: after a stop, an abort, or a preemption.
        """
        request, found = self.flow_attention.pop(request_id, (None, None))
        if request is None or request.num_output_tokens <= found.token:
            return
        if self.flow_log.add(client_request_id(request_id), found):
            self.flow_logged[request_id] += found.num_rows

    def shutdown(self) -> None:
        super().shutdown()
        if self.flow_log is not None:
            self.flow_log.close()

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        evicts = request.request_id in self.flow_requests.layouts
        kv_transfer_params, ec_transfer_params = super()._free_request(request, *args, **kwargs)
        found: dict[str, Any] = {}
        if evicts:
            found |= metrics.report(self.flow_footprints[request.request_id], self.flow_geometry)
        if request.request_id in self.flow_logged:
            self._log_token(request.request_id)  # the last one, before it is reported
            # An aborted request's report reaches nobody; what was dropped waits for the next one.
            aborted = request.status is RequestStatus.FINISHED_ABORTED
            found |= metrics.log_report(
                self.flow_logged.pop(request.request_id),
                0 if aborted else self.flow_log.take_dropped(),
            )
        if found:
            kv_transfer_params = {**(kv_transfer_params or {}), metrics.REPORT_KEY: found}
        return kv_transfer_params, ec_transfer_params

    def _free_blocks(self, request: Request) -> None:
        self._remember(request)
        super()._free_blocks(request)
        self.flow_requests.remove(request.request_id)

    def _free_request_blocks(self, request: Request) -> None:
        """Called when a request ends, and when it is preempted."""
        if request.request_id in self.flow_requests.layouts:
            # Blocks of a layout are cached one step late; the last step's are cached here.
            # Tokens in flight have no hash yet.
            self.kv_cache_manager.cache_blocks(
                request, min(request.num_computed_tokens, request.num_tokens)
            )
        super()._free_request_blocks(request)

    def _remember(self, request: Request) -> None:
        layout = self.flow_requests.layouts.get(request.request_id)
        self.flow_footprints[request.request_id] = Footprint(
            cliff=self.flow_settings.num_layers if layout is None else layout.cliff,
            prompt_tokens=request.num_prompt_tokens,
            image_tokens=image_spans(request.mm_features).total,
            computed_tokens=request.num_computed_tokens,
            blocks=tuple(
                len(manager.req_to_blocks.get(request.request_id, ()))
                for manager in self.flow_managers
            ),
        )
        if len(self.flow_footprints) > FOOTPRINTS_KEPT:
            self.flow_footprints.popitem(last=False)


def client_request_id(request_id: str) -> str:
    """The id that the client knows, from the engine's: vLLM appends a dash and eight characters.

    The n-th of several answers to one request keeps the ``n_`` that vLLM puts in front.
    """
    return request_id if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else request_id[:-9]


class FlowScheduler(_FlowScheduling, Scheduler):
    """vLLM's scheduler over storage groups."""


class FlowAsyncScheduler(_FlowScheduling, AsyncScheduler):
    """vLLM's async scheduler over storage groups."""
