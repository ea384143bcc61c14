"""Adapter for Model Runner V2 (CUDA's default).

Seams: the runner's ``load_model``, ``get_kv_cache_spec``, ``initialize_kv_cache``, ``_dummy_run``, ``capture_model``,
``update_requests`` and ``sample_tokens``, and its ``ModelState`` (``vllm/v1/worker/gpu/model_states/interface.py``):
``add_request``, ``remove_request``, ``get_additional_cg_support`` and ``prepare_attn``, which a drafter calls, too.
Gathers the step's inputs and arms the decoder hook and the attention hook, or, for a step that was captured in a
CUDA graph, refreshes what the graph reads; takes no decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_flow.engine import (
    adoption,
    aux_hidden_states,
    decode_graphs,
    draft_layers,
    model_call,
    mutual_attention,
)
from vllm_flow.engine.attention.tap import AttentionTap
from vllm_flow.engine.decode_graphs import DecodeBuffers, unreplayable
from vllm_flow.engine.decoder import DecoderHook, DeviceStep
from vllm_flow.engine.equipment import equip
from vllm_flow.engine.groups import group_specs, storage_layer
from vllm_flow.engine.metadata import StepBuilder
from vllm_flow.engine.moving import RowMover, rewrites_of
from vllm_flow.engine.prompt_scores import FlowPromptLogprobs
from vllm_flow.engine.requests import LayoutBook, logged_request
from vllm_flow.engine.sending import sent
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.shared_metadata import sharing
from vllm_flow.engine.step_inputs import StepInputs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


class FlowModelState(ModelState):
    """What evicting adds to a model's own state; see :func:`vllm_flow.engine.adoption.adopt`."""

    flow_requests: LayoutBook
    flow_hook: DecoderHook
    flow_steps: StepBuilder
    flow_mover: RowMover
    flow_attn_groups: Callable[[], Sequence[Sequence[Any]]]
    """The runner's, per KV-cache group, once it has made them."""
    flow_tap: AttentionTap | None
    """Only where the operator configured an attention log."""
    flow_buffers: DecodeBuffers | None
    """Only where decode steps are captured in CUDA graphs."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        layout = self.flow_requests.add(
            new_req_data.req_id,
            new_req_data.sampling_params,
            new_req_data.mm_features,
            len(new_req_data.prompt_token_ids or ()),
        )
        if self.flow_tap is not None:
            logged = logged_request(new_req_data, self.flow_requests.num_layers, layout)
            self.flow_tap.add(new_req_data.req_id, logged)
        super().add_request(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        self.flow_requests.remove(req_id)
        self.flow_hook.forget(req_id)
        if self.flow_tap is not None:
            self.flow_tap.remove(req_id)
        super().remove_request(req_id)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """None for full graphs where ours could not be replayed: vLLM then captures in pieces."""
        reason = unreplayable(self.flow_attn_groups())
        if reason is None:
            return super().get_additional_cg_support()
        return AttentionCGSupport.NEVER, reason

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: Sequence[torch.Tensor],
        slot_mappings: torch.Tensor,
        attn_groups: Sequence[Sequence[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        def stock(groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
            return super(FlowModelState, self).prepare_attn(
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                groups,
                kv_cache_config,
                for_capture,
                *args,
                **kwargs,
            )

        if for_capture or cudagraph_mode == CUDAGraphMode.FULL:
            self.flow_hook.arm(None)  # a replay calls no model, and loses no row
            found, drafting = {}, self.vllm_config.speculative_config is not None
            if drafting and any(drafters := decode_graphs.of_drafters(attn_groups)):
                found = stock(drafters)
            if not drafting or not decode_graphs.are_drafters(attn_groups):
                found |= self._prepare_graph(
                    input_batch,
                    cudagraph_mode,
                    block_tables,
                    attn_groups,
                    kv_cache_config,
                    for_capture,
                )
            return found
        step = self._plan_flow_step(input_batch, block_tables, padded_rows=slot_mappings.shape[1])
        self.flow_hook.arm(step)
        return stock(sharing(attn_groups))

    def _plan_flow_step(
        self, input_batch: Any, block_tables: Sequence[torch.Tensor], padded_rows: int
    ) -> DeviceStep | None:
        # Dummy batches carry ids that no request has, so they get a stock pass.
        shares = (
            input_batch.req_ids,
            input_batch.num_computed_tokens_np[: input_batch.num_reqs],
            input_batch.num_scheduled_tokens[: input_batch.num_reqs],
        )
        plan = self.flow_requests.plan(*shares)
        readings = self.flow_requests.late_readings(plan, *shares)
        if self.flow_tap is not None and self.flow_tap.requests:
            self.flow_tap.arm(plan, *shares, block_tables)
        if plan is None and not readings:
            return None
        late = self.flow_steps.late(readings, shares[0], block_tables)
        inputs = StepInputs(block_tables, padded_rows, self._rejected_tokens(input_batch))
        return self.flow_steps.build(plan, inputs, late)

    def _rejected_tokens(self, input_batch: Any) -> torch.Tensor | None:
        """[requests] drafts of each that were rejected, which the host was told it has computed; None where the host
        knows."""
        drafting = self.vllm_config.speculative_config is not None
        if not drafting or not self.scheduler_config.async_scheduling:
            return None
        count = input_batch.num_reqs
        told = sent(input_batch.seq_lens_cpu_upper_bound[:count], self.device)
        rejected: torch.Tensor = told - input_batch.seq_lens[:count]
        return rejected

    def _prepare_graph(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: Sequence[torch.Tensor],
        attn_groups: Sequence[Sequence[Any]],
        kv_cache_config: Any,
        for_capture: bool,
    ) -> dict[str, Any]:
        """Of a captured step: capture it, replay it, or replay it with nobody's requests.

        Returns:
            Metadata by the target's layers for a capture; a replay runs no Python that would ask for it.
        """
        buffers = self.flow_buffers
        if cudagraph_mode != CUDAGraphMode.FULL:
            if buffers is None or not buffers.stand_on(block_tables):
                buffers = self.flow_buffers = DecodeBuffers(
                    block_tables,
                    kv_cache_config,
                    self.flow_requests.num_layers,
                    self.max_num_reqs,
                    self.num_new_sampled_tokens_per_step + self.vllm_config.num_speculative_tokens,
                )
            step = buffers.capture(input_batch, block_tables, attn_groups, self.max_model_len)
            self.flow_hook.arm(step)
            return step.attn_metadata
        assert buffers is not None, "a graph is captured before it is replayed"
        seq_lens = input_batch.seq_lens[: input_batch.num_reqs_after_padding]
        if for_capture:
            buffers.blank(seq_lens)
        else:
            count = input_batch.num_reqs
            facts = self.flow_requests.decode_facts(
                input_batch.req_ids,
                input_batch.num_computed_tokens_np[:count],
                input_batch.num_scheduled_tokens[:count],
            )
            rows = input_batch.num_tokens_after_padding // input_batch.num_reqs_after_padding
            buffers.refresh(seq_lens, facts, count, rows)
        return {}


class FlowRunnerV2(model_call.EagerProfile):
    """Mixed in before the runner's own class by :func:`adopt`."""

    flow_settings: FlowSettings

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        state = self.model_state
        adoption.adopt(state, FlowModelState)
        mutual_of = mutual_attention.reader(self.vllm_config)
        state.flow_requests = LayoutBook(self.flow_settings.num_layers, mutual_of)
        state.flow_hook = model_call.adopt(self.model, self.vllm_config, self.flow_settings)
        state.flow_attn_groups = lambda: self.attn_groups
        if aux_hidden_states.reads_between_layers(self.vllm_config):
            aux_hidden_states.check_collects(state.flow_hook.decoder)
        state.flow_tap = None
        state.flow_buffers = None
        if self.prompt_logprobs_worker is not None:  # of a model that generates
            adoption.adopt(self.prompt_logprobs_worker, FlowPromptLogprobs)
            self.prompt_logprobs_worker.flow_hook = state.flow_hook

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs = super().get_kv_cache_spec()
        drafters = getattr(self.speculator, "draft_attn_layer_names", ())
        draft_layers.check_layers(
            specs, drafters, lambda name: storage_layer(name, self.flow_settings)
        )
        return group_specs(specs, self.flow_settings)

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        equip(self.model_state, self, kv_cache_config, is_profiling)

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        taken: int = super().capture_model(*args, **kwargs)
        # Graphs of a drafter's first step are captured with metadata of the target, which is not called.
        self.model_state.flow_hook.arm(None)
        return taken

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        if rewrites := rewrites_of(scheduler_output):
            state = self.model_state
            layouts, ranker = state.flow_requests.layouts, state.flow_hook.ranker
            state.flow_mover.move(rewrites, layouts, ranker)
            for request_id, of_request in rewrites.items():
                row = self.req_states.req_id_to_index[request_id]
                for group, rewrite in of_request.items():
                    # The blocks that stay; vLLM appends the new ones.
                    self.block_tables.num_blocks.np[group, row] = rewrite.kept
        super().update_requests(scheduler_output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        tap = self.model_state.flow_tap
        return output if tap is None else tap.attach(output)

    def reset_encoder_cache(self) -> None:
        super().reset_encoder_cache()
        self.model_state.flow_hook.forget_pictures()


def adopt(runner: Any, settings: FlowSettings) -> None:
    """Turn a freshly built V2 runner, of whatever platform, into one that evicts."""
    adoption.adopt(runner, FlowRunnerV2)
    runner.flow_settings = settings
