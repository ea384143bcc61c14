"""The scheduler that knows each request's layout before its first block is allocated.

Seam: ``SchedulerConfig.scheduler_cls``. Two classes, since vLLM keeps async scheduling in a
subclass of its own. Registers and forgets layouts. What looks on (footprints, reports, the attention
log) are observers with files of their own. The one scheduling decision that is ours: a request waits
a step where a request of its policy is computing its prefix.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_flow.block_counts import Geometry
from vllm_flow.engine import adoption, groups, mutual_attention
from vllm_flow.engine.core import bulk_pool, coordination, encoder_cache, events
from vllm_flow.engine.core.attention.answers import LoggedAnswers
from vllm_flow.engine.core.attention.writer import AttentionLogWriter
from vllm_flow.engine.core.connectors import FlowConnector
from vllm_flow.engine.core.footprints import FootprintBook
from vllm_flow.engine.core.observers import Observer
from vllm_flow.engine.core.prefix import FlowKVCacheManager
from vllm_flow.engine.core.report_observer import Reports
from vllm_flow.engine.core.storage_groups import StorageGroups
from vllm_flow.engine.layout_book import LayoutBook
from vllm_flow.engine.report import REPORT_KEY
from vllm_flow.engine.requests import with_digest
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.support import check_hash_unit
from vllm_flow.engine.wire import REWRITES_FIELD
from vllm_flow.mutual import shortened_chunk
from vllm_flow.rewriting import Rewrite


class _FlowScheduling:
    """What both schedulers add to vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        groups.register()
        super().__init__(*args, **kwargs)
        settings = FlowSettings.of(self.vllm_config)
        assert settings is not None, "this scheduler class is set by vLLM-Flow's configuration"
        self.flow_settings = settings
        mutual_of = mutual_attention.reader(self.vllm_config)
        self.flow_requests = LayoutBook(settings.num_layers, mutual_of)
        manager = self.kv_cache_manager
        self.flow_groups = StorageGroups.of(
            manager.coordinator.single_type_managers,
            self.flow_requests.layouts,
            drafts=self.num_spec_tokens > 0,
        )
        if self.cache_config.enable_prefix_caching:
            check_hash_unit(self.hash_block_size, [m.block_size for m in self.flow_groups.managers])
        coordination.coordinate(manager.coordinator, self.flow_groups)
        bulk_pool.speed_up(manager.block_pool)
        events.tell(manager.block_pool)
        adoption.adopt(manager, FlowKVCacheManager, flow_groups=self.flow_groups)
        if self.connector is not None:
            adoption.adopt(
                self.connector,
                FlowConnector,
                flow_layouts=self.flow_requests.layouts,
                flow_group_layers=settings.group_layers,
                flow_hands_over=settings.engine.hands_over,
                flow_handed=set(),
            )
        # Of the step being scheduled: encoder outputs, by the picture's hash; and whether a request lacks room for
        # the pictures that it must compute together.
        self.flow_booked: dict[str, encoder_cache.Booking] = {}
        self.flow_short = False
        self._observe(settings)

    def _observe(self, settings: FlowSettings) -> None:
        layouts, managers = self.flow_groups.layouts, self.flow_groups.managers
        self.flow_footprints = FootprintBook(settings.num_layers, layouts, managers)
        self.flow_logged: LoggedAnswers | None = None
        if settings.attention_log is not None:
            log = AttentionLogWriter(settings.attention_log, settings.attention_log_max_bytes)
            self.flow_logged = LoggedAnswers(log, self.requests, settings.num_layers)
        self.flow_geometry = Geometry(
            settings.num_layers,
            settings.group_starts,
            self.flow_groups.block_size,
            # A block is spread over the workers of a tensor-parallel group, each with its heads.
            managers[0].spec.page_size_bytes
            * settings.layers_per_block
            * self.vllm_config.parallel_config.tensor_parallel_size,
        )
        self.flow_reports = Reports(
            self.flow_geometry,
            layouts,
            self.flow_footprints.latest,
            (lambda _: 0) if self.flow_logged is None else self.flow_logged.layers_of,
        )
        logged = () if self.flow_logged is None else (self.flow_logged,)
        self.flow_observers: tuple[Observer, ...] = (
            self.flow_footprints,
            self.flow_reports,
            *logged,
        )

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:  # else more of a streaming session's input
            self._add_layout(request)
            for observer in self.flow_observers:
                observer.added(request)
        super().add_request(request)

    def _add_layout(self, request: Request) -> None:
        layout = self.flow_requests.add(
            request.request_id,
            request.sampling_params,
            request.mm_features,
            request.num_prompt_tokens,
        )
        if layout is not None and layout.shareable is not None:
            self.flow_requests.layouts[request.request_id] = with_digest(layout, request)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """More of a streaming session's input has joined its prompt, pictures among it, which may see one another."""
        super()._update_request_as_session(session, update)
        self._add_layout(session)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.flow_groups.in_flight.clear()
        self.flow_booked.clear()
        self.flow_short = False
        output = super().schedule(*args, **kwargs)
        encoder_cache.settle(
            output,
            self.flow_booked,
            self.encoder_cache_manager,
            self.requests,
            with_pictures=not self.use_v2_model_runner,
        )
        if not self.flow_requests.layouts:
            return output
        rewrites: dict[str, dict[int, Rewrite]] = {}
        for manager in self.flow_groups.managers:
            for request_id, rewrite in manager.late.take_rewrites().items():
                rewrites.setdefault(request_id, {})[manager.kv_cache_group_id] = rewrite
        if rewrites:
            setattr(output, REWRITES_FIELD, rewrites)
        return output

    def _allocate_encoder_inputs(
        self, request: Request, input_ids: list[int], *args: Any, **kwargs: Any
    ) -> None:
        super()._allocate_encoder_inputs(request, input_ids, *args, **kwargs)
        for index in input_ids:
            self.flow_booked[request.mm_features[index].identifier] = encoder_cache.Booking(
                request.request_id, index
            )

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        """Of a chunk's tokens, those up to what must be computed in one step and is not whole in it, or
        up to what must not be computed with it.

        vLLM's own switch (``disable_chunked_mm_input``) still divides an image at whose first token a
        chunk begins. Where the tokens of an image see one another, that is prevented for every request.
        Before vLLM's work, or it would book an encoder's output for nothing; and after it, since a full
        encoder cache shortens the chunk. Then the request keeps no picture, and no request that cannot go on keeps
        one that has begun: of two that wait for the rest of theirs, neither would get it. And those behind it begin
        none in this step, or it would wait for as long as they come.
        """
        layout = self.flow_requests.layouts.get(request.request_id)
        mutual = self.flow_requests.mutual.get(request.request_id, ())
        cache, wanted = self.encoder_cache_manager, num_new_tokens
        if self.flow_short:
            num_new_tokens = encoder_cache.begun(
                cache, request, num_computed_tokens, num_new_tokens, shift_computed_tokens
            )

        def cut(tokens: int) -> int:
            if layout is not None:
                tokens = layout.shortened_chunk(num_computed_tokens, tokens, shift_computed_tokens)
            return shortened_chunk(mutual, num_computed_tokens, tokens)

        asked = cut(num_new_tokens)
        inputs, tokens, budget, external, doubles = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, asked, encoder_compute_budget, shift_computed_tokens
        )
        tokens = cut(tokens)
        short = layout is not None and layout.leaves_out(num_computed_tokens, tokens, asked)
        if not short and (tokens or not wanted):
            return inputs, tokens, budget, external, doubles
        self.flow_short |= short
        end = num_computed_tokens + (tokens and tokens + shift_computed_tokens) if short else None
        needed = encoder_cache.give_back(cache, request, num_computed_tokens, end)
        inputs, doubles = ([at for at in found if at in needed] for found in (inputs, doubles))
        return inputs, tokens, budget, external, doubles

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Where a chunk ends for the sake of states that can be found: not in what must be computed in one step."""
        tokens = super()._mamba_block_aligned_split(
            request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
        )
        layout = self.flow_requests.layouts.get(request.request_id)
        if layout is None:
            return tokens
        first = (
            request.num_computed_tokens
            + num_new_local_computed_tokens
            + num_external_computed_tokens
        )
        return layout.extended_chunk(first, tokens, num_new_tokens)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be scheduled in this step.

        It waits while a longer part of its prompt is being computed for another request. That
        lasts as long as the other one advances, and then saves computing it a second time.
        """
        if not super()._handle_blocked_waiting_request(request):
            return False
        return not self.kv_cache_manager.has_prefix_in_flight(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        for observer in self.flow_observers:
            observer.step_ended(model_runner_output)
        result = super().update_from_output(scheduler_output, model_runner_output)
        told = [output for outputs in result.values() for output in outputs.outputs]
        for observer in self.flow_observers:
            observer.step_told(told)
        return result

    def shutdown(self) -> None:
        super().shutdown()
        for observer in self.flow_observers:
            observer.closed()

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        # Here, since a connector may keep the blocks beyond the response.
        for observer in self.flow_observers:
            observer.freeing(request)
        kv_transfer_params, ec_transfer_params = super()._free_request(
            request, delay_free_blocks, *args, **kwargs
        )
        if delay_free_blocks and request.request_id in self.flow_requests.layouts:
            # Its prompt was still to be received, and counted already: nobody may find such blocks.
            request.num_computed_tokens = 0
        found: dict[str, Any] = {}
        for observer in self.flow_observers:
            found |= observer.finished(request)
        if found:
            kv_transfer_params = {**(kv_transfer_params or {}), REPORT_KEY: found}
        return kv_transfer_params, ec_transfer_params

    def _free_blocks(self, request: Request) -> None:
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
        if not request.is_finished():
            self.kv_cache_manager.coordinator.unname(request)
        super()._free_request_blocks(request)


class FlowScheduler(_FlowScheduling, Scheduler):
    """vLLM's scheduler over storage groups."""


class FlowAsyncScheduler(_FlowScheduling, AsyncScheduler):
    """vLLM's async scheduler over storage groups."""
