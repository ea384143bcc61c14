"""Adapter for Model Runner V2 (CUDA's default).

Seams, beside those of `runner`: the runner's ``initialize_kv_cache``, ``capture_model`` and ``update_requests``, the
``dispatch`` of its ``cudagraph_manager``, and its ``ModelState``
(``vllm/v1/worker/gpu/model_states/interface.py``): ``add_request``, ``remove_request``,
``get_additional_cg_support`` and ``prepare_attn``, which a drafter calls, too. Gathers the step's inputs and arms the
decoder hook, or, for a step that was captured in a CUDA graph, refreshes what the graph reads; takes no decision.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_flow.engine import adoption
from vllm_flow.engine.worker import decode_graphs
from vllm_flow.engine.worker.decode_graphs import DecodeBuffers, unreplayable
from vllm_flow.engine.worker.prompt_scores import FlowPromptLogprobs
from vllm_flow.engine.worker.runner import FlowRunner
from vllm_flow.engine.worker.shared_metadata import sharing
from vllm_flow.engine.worker.step_inputs import Lengths, StepInputs
from vllm_flow.engine.worker.worker_state import WorkerState
from vllm_flow.step import StepShares

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


class FlowModelState(ModelState):
    """What evicting adds to a model's own state; see :func:`vllm_flow.engine.adoption.adopt`."""

    flow_state: WorkerState
    """The runner's."""
    flow_attn_groups: Callable[[], Sequence[Sequence[Any]]]
    """The runner's, per KV-cache group, once it has made them."""
    flow_buffers: DecodeBuffers | None
    """Only where decode steps are captured in CUDA graphs."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        self.flow_state.add(new_req_data)
        super().add_request(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        self.flow_state.remove(req_id)
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
            self.flow_state.hook.arm(None)  # a replay calls no model, and loses no row
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
        # Dummy batches carry ids that no request has, so they get a stock pass.
        shares, padded = _shares(input_batch), slot_mappings.shape[1]
        step = self.flow_state.plan(
            shares, lambda: StepInputs(block_tables, padded, self._flow_lengths(input_batch))
        )
        self.flow_state.hook.arm(step)
        return stock(sharing(attn_groups))

    def _flow_lengths(self, input_batch: Any) -> Lengths | None:
        drafting = self.vllm_config.speculative_config is not None
        if not drafting or not self.scheduler_config.async_scheduling:
            return None
        count = input_batch.num_reqs
        told, known = input_batch.seq_lens_cpu_upper_bound, input_batch.seq_lens
        return Lengths(told[:count], known[:count])

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
                    self.flow_state.settings.num_layers,
                    self.max_num_reqs,
                    self.num_new_sampled_tokens_per_step + self.vllm_config.num_speculative_tokens,
                )
            step = buffers.capture(input_batch, block_tables, attn_groups, self.max_model_len)
            self.flow_state.hook.arm(step)
            return step.attn_metadata
        assert buffers is not None, "a graph is captured before it is replayed"
        seq_lens = input_batch.seq_lens[: input_batch.num_reqs_after_padding]
        if for_capture:
            buffers.blank(seq_lens)
        else:
            facts = self.flow_state.planner.decode_facts(_shares(input_batch))
            rows = input_batch.num_tokens_after_padding // input_batch.num_reqs_after_padding
            buffers.refresh(seq_lens, facts, input_batch.num_reqs, rows)
        return {}


def _shares(input_batch: Any) -> StepShares:
    count = input_batch.num_reqs
    return StepShares(
        input_batch.req_ids,
        input_batch.num_computed_tokens_np[:count],
        input_batch.num_scheduled_tokens[:count],
    )


class FlowGraphManager:
    """What evicting adds to vLLM's choice of a graph for a step."""

    flow_runner: FlowRunner

    def dispatch(self, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if not self.flow_runner.flow_without_graph:
            return super().dispatch(num_reqs, num_tokens, *args, **kwargs)  # type: ignore[misc]
        # No graph is captured for a step of no tokens.
        found = super().dispatch(num_reqs, 0, *args, **kwargs)  # type: ignore[misc]
        return replace(found, num_tokens=num_tokens)


class FlowRunnerV2(FlowRunner):
    """Mixed in before the runner's own class by :mod:`vllm_flow.engine.worker.worker`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        state = self.model_state
        adoption.adopt(
            state,
            FlowModelState,
            flow_state=self.flow_state,
            flow_attn_groups=lambda: self.attn_groups,
            flow_buffers=None,
        )
        if self.prompt_logprobs_worker is not None:  # of a model that generates
            adoption.adopt(
                self.prompt_logprobs_worker, FlowPromptLogprobs, flow_hook=self.flow_state.hook
            )

    def _flow_drafters(self) -> Collection[str]:
        return getattr(self.speculator, "draft_attn_layer_names", ())

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        # Made for the tables of profiling, which would stay with them.
        self.model_state.flow_buffers = None
        super().initialize_kv_cache(*args, **kwargs)
        if self.flow_state.shares_experts:
            adoption.adopt(self.cudagraph_manager, FlowGraphManager, flow_runner=self)

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        taken: int = super().capture_model(*args, **kwargs)
        # Graphs of a drafter's first step are captured with metadata of the target, which is not called.
        self.flow_state.hook.arm(None)
        return taken

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        for request_id, of_request in self.flow_state.move(scheduler_output).items():
            row = self.req_states.req_id_to_index[request_id]
            for group, rewrite in of_request.items():
                # The blocks that stay; vLLM appends the new ones.
                self.block_tables.num_blocks.np[group, row] = rewrite.kept
        self.flow_without_graph = self.flow_state.without_graph(scheduler_output)
        super().update_requests(scheduler_output)
