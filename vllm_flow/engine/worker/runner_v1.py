"""Adapter for Model Runner V1 (CPU's, and CUDA's with ``VLLM_USE_V2_MODEL_RUNNER=0``).

Seams, beside those of `runner`: ``initialize_kv_cache``, ``_update_states``,
``_determine_batch_execution_and_padding``, ``_get_slot_mappings``, ``_build_attention_metadata``,
``sync_and_gather_intermediate_tensors`` and ``_get_prompt_logprobs_dict`` of ``vllm/v1/worker/gpu_model_runner.py``.
Gathers the step's inputs and arms the decoder hook; takes no decision.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from vllm_flow.engine import pipeline
from vllm_flow.engine.core import encoder_cache
from vllm_flow.engine.wire import Rewrites
from vllm_flow.engine.worker import accepted_counts, cpu_groups, shared_metadata
from vllm_flow.engine.worker.choosing import telling
from vllm_flow.engine.worker.runner import FlowRunner
from vllm_flow.engine.worker.step_inputs import DraftCounts, Lengths, StepInputs
from vllm_flow.step import StepShares

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class FlowRunnerV1(FlowRunner):
    """Mixed in before the runner's own class by :mod:`vllm_flow.engine.worker.worker`."""

    flow_shared_build: cpu_groups.SharedBuild | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        pipeline.make_room(self)

    def _flow_drafters(self) -> Collection[str]:
        drafter = getattr(self, "drafter", None)
        return getattr(drafter, "_draft_attn_layer_names", ())

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        self.flow_shared_build = cpu_groups.share(self)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.flow_state.remove(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            self.flow_state.add(request)
        encoder_cache.restore(self.requests, scheduler_output)
        self._cut_block_tables(self.flow_state.move(scheduler_output))
        self.flow_without_graph = self.flow_state.without_graph(scheduler_output)
        with accepted_counts.counts_by_former_rows(self):
            return super()._update_states(scheduler_output)

    def _determine_batch_execution_and_padding(
        self, *args: Any, force_eager: bool = False, **kwargs: Any
    ) -> Any:
        eager = force_eager or self.flow_without_graph
        return super()._determine_batch_execution_and_padding(*args, force_eager=eager, **kwargs)

    def sync_and_gather_intermediate_tensors(
        self, num_tokens: int, intermediate_tensors: Any, sync_self: bool
    ) -> Any:
        # Copied into tensors of the names that vLLM knows.
        own = telling.without(intermediate_tensors) if sync_self else intermediate_tensors
        return super().sync_and_gather_intermediate_tensors(num_tokens, own, sync_self)

    def _cut_block_tables(self, rewrites: Rewrites) -> None:
        """Leave the blocks that stay; vLLM appends the new ones."""
        for request_id, of_request in rewrites.items():
            row = self.input_batch.req_id_to_index.get(request_id)
            for group, rewrite in of_request.items():
                del self.requests[request_id].block_ids[group][rewrite.kept :]
                if row is not None:
                    table = self.input_batch.block_table[group]
                    # Nobody may write behind them, where a drafter looks further than the blocks that it needs.
                    table.block_table.np[row, rewrite.kept : table.num_blocks_per_row[row]] = 0
                    table.num_blocks_per_row[row] = rewrite.kept

    def _get_slot_mappings(
        self,
        num_tokens_padded: int,
        num_reqs_padded: int,
        num_tokens_unpadded: int,
        ubatch_slices: Any = None,
    ) -> Any:
        shared = self.flow_shared_build
        padded = num_tokens_padded != num_tokens_unpadded
        if shared is None or padded or ubatch_slices is not None:
            return super()._get_slot_mappings(
                num_tokens_padded, num_reqs_padded, num_tokens_unpadded, ubatch_slices
            )
        return shared.slot_mappings(num_tokens_padded)

    def _build_attention_metadata(
        self,
        *args: Any,
        num_scheduled_tokens: dict[str, int] | None = None,
        slot_mappings: Mapping[int, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        shared, build = self.flow_shared_build, super()._build_attention_metadata
        kwargs |= {"num_scheduled_tokens": num_scheduled_tokens, "slot_mappings": slot_mappings}
        if shared is None:
            built = shared_metadata.shown(self, build, *args, **kwargs)
        else:
            built = shared.build(build, *args, **kwargs)
        if shared is not None and slot_mappings is not None:
            shared.spread(built[0], slot_mappings)
        step = None
        # Absent in dummy runs, whose rows belong to no request.
        if num_scheduled_tokens and self.flow_state.plans:
            padded = 0 if slot_mappings is None else len(slot_mappings[0])
            shares = self._flow_shares(num_scheduled_tokens)
            step = self.flow_state.plan(shares, lambda: self._flow_inputs(padded))
        self.flow_state.hook.arm(step)
        return built

    def _flow_shares(self, num_scheduled_tokens: Mapping[str, int]) -> StepShares:
        batch = self.input_batch
        return StepShares(
            batch.req_ids,
            batch.num_computed_tokens_cpu[: batch.num_reqs].tolist(),
            [num_scheduled_tokens[request_id] for request_id in batch.req_ids],
        )

    def _flow_inputs(self, padded_rows: int) -> StepInputs:
        """What is known of the batch as it is now."""
        batch, count = self.input_batch, self.input_batch.num_reqs
        block_tables = [
            batch.block_table[group].get_device_tensor(count)
            for group in range(len(self.kv_cache_config.kv_cache_groups))
        ]
        lengths = counts = None
        if self.use_async_spec_decode:
            told, known = batch.num_computed_tokens_cpu_tensor, self.num_computed_tokens
            lengths = Lengths(told[:count], known[:count])
        if self.speculative_config is not None and self.flow_state.settings.engine.attending:
            accepted, drafts = self.num_accepted_tokens.gpu, self.num_decode_draft_tokens.cpu
            counts = DraftCounts(accepted[:count], drafts[:count])
        return StepInputs(block_tables, padded_rows, lengths, counts)

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if self.num_prompt_logprobs:
            hidden_states = self.flow_state.hook.marked(hidden_states)
        return super()._get_prompt_logprobs_dict(hidden_states, *args, **kwargs)
