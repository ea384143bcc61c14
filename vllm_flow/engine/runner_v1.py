"""Adapter for Model Runner V1 (CPU's, and CUDA's with ``VLLM_USE_V2_MODEL_RUNNER=0``).

Seams: ``load_model``, ``get_kv_cache_spec``, ``initialize_kv_cache``, ``reset_encoder_cache``, ``_update_states``,
``_build_attention_metadata``, ``_dummy_run``, ``_get_prompt_logprobs_dict`` and ``sample_tokens`` of
``vllm/v1/worker/gpu_model_runner.py``. Gathers the step's inputs and arms the decoder hook and the
attention hook; takes no decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vllm_flow.engine import (
    accepted_counts,
    adoption,
    aux_hidden_states,
    cpu_groups,
    draft_layers,
    encoder_cache,
    model_call,
    mutual_attention,
)
from vllm_flow.engine.attention.tap import AttentionTap
from vllm_flow.engine.decoder import DecoderHook
from vllm_flow.engine.device_step import DeviceStep
from vllm_flow.engine.equipment import equip
from vllm_flow.engine.groups import group_specs, storage_layer
from vllm_flow.engine.metadata import StepBuilder
from vllm_flow.engine.moving import Rewrites, RowMover, rewrites_of
from vllm_flow.engine.requests import LayoutBook, logged_request
from vllm_flow.engine.sending import sent
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.step_inputs import DraftCounts, StepInputs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class FlowRunnerV1(model_call.EagerProfile):
    """Mixed in before the runner's own class by :func:`adopt`."""

    flow_settings: FlowSettings
    flow_requests: LayoutBook
    flow_hook: DecoderHook
    flow_steps: StepBuilder
    flow_mover: RowMover
    flow_tap: AttentionTap | None
    """Only where the operator configured an attention log."""
    flow_shared_build: cpu_groups.SharedBuild | None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.flow_hook = model_call.adopt(self.model, self.vllm_config, self.flow_settings)
        if aux_hidden_states.reads_between_layers(self.vllm_config):
            aux_hidden_states.check_collects(self.flow_hook.decoder)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs = super().get_kv_cache_spec()
        drafters = getattr(getattr(self, "drafter", None), "_draft_attn_layer_names", ())
        draft_layers.check_layers(
            specs, drafters, lambda name: storage_layer(name, self.flow_settings)
        )
        return group_specs(specs, self.flow_settings)

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        equip(self, self, kv_cache_config, is_profiling)
        self.flow_shared_build = cpu_groups.share(self)

    def reset_encoder_cache(self) -> None:
        super().reset_encoder_cache()
        self.flow_hook.forget_pictures()

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.flow_requests.remove(request_id)
            self.flow_hook.forget(request_id)
            if self.flow_tap is not None:
                self.flow_tap.remove(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            layout = self.flow_requests.add(
                request.req_id,
                request.sampling_params,
                request.mm_features,
                len(request.prompt_token_ids or ()),
            )
            if self.flow_tap is not None:
                logged = logged_request(request, self.flow_settings.num_layers, layout)
                self.flow_tap.add(request.req_id, logged)
        encoder_cache.restore(self.requests, scheduler_output)
        if rewrites := rewrites_of(scheduler_output):
            self.flow_mover.move(rewrites, self.flow_requests.layouts, self.flow_hook.ranker)
            self._cut_block_tables(rewrites)
        with accepted_counts.counts_by_former_rows(self):
            return super()._update_states(scheduler_output)

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
        built = build(*args, **kwargs) if shared is None else shared.build(build, *args, **kwargs)
        if shared is not None and slot_mappings is not None:
            shared.spread(built[0], slot_mappings)
        step = None
        if num_scheduled_tokens:  # absent in dummy runs, whose rows belong to no request
            padded = 0 if slot_mappings is None else len(slot_mappings[0])
            step = self._plan_flow_step(num_scheduled_tokens, padded)
        self.flow_hook.arm(step)
        return built

    def _plan_flow_step(
        self, num_scheduled_tokens: dict[str, int], padded_rows: int
    ) -> DeviceStep | None:
        batch = self.input_batch
        logs = self.flow_tap is not None and self.flow_tap.requests
        if not self.flow_requests.layouts and not logs:
            return None
        shares = (
            batch.req_ids,
            batch.num_computed_tokens_cpu[: batch.num_reqs].tolist(),
            [num_scheduled_tokens[request_id] for request_id in batch.req_ids],
        )
        plan = self.flow_requests.plan(*shares)
        readings = self.flow_requests.late_readings(plan, *shares)
        if plan is None and not readings and not logs:
            return None
        block_tables = [
            batch.block_table[group].get_device_tensor(batch.num_reqs)
            for group in range(len(self.kv_cache_config.kv_cache_groups))
        ]
        if logs:
            self.flow_tap.arm(plan, *shares, block_tables)
        if plan is None and not readings:
            return None
        late = self.flow_steps.late(readings, batch.req_ids, block_tables)
        inputs = StepInputs(
            block_tables, padded_rows, self._rejected_tokens(), self._draft_counts()
        )
        return self.flow_steps.build(plan, inputs, late)

    def _draft_counts(self) -> DraftCounts | None:
        """What layers with states know of drafts; None where there are no drafts, or no states."""
        if self.speculative_config is None or not self.flow_settings.attending:
            return None
        count = self.input_batch.num_reqs
        return DraftCounts(
            self.num_accepted_tokens.gpu[:count], self.num_decode_draft_tokens.cpu[:count]
        )

    def _rejected_tokens(self) -> torch.Tensor | None:
        """[requests] drafts of each that were rejected, which the host was told it has computed; None where the host
        knows."""
        if not self.use_async_spec_decode:
            return None
        batch, count = self.input_batch, self.input_batch.num_reqs
        told = sent(batch.num_computed_tokens_cpu_tensor[:count], self.device)
        rejected: torch.Tensor = told - self.num_computed_tokens[:count]
        return rejected

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if self.num_prompt_logprobs:
            hidden_states = self.flow_hook.marked(hidden_states)
        return super()._get_prompt_logprobs_dict(hidden_states, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        return output if self.flow_tap is None else self.flow_tap.attach(output)


def adopt(runner: Any, settings: FlowSettings) -> None:
    """Turn a freshly built V1 runner, of whatever platform, into one that evicts."""
    adoption.adopt(runner, FlowRunnerV1)
    runner.flow_settings = settings
    runner.flow_shared_build = None
    mutual_of = mutual_attention.reader(runner.vllm_config)
    runner.flow_requests = LayoutBook(settings.num_layers, mutual_of)
    runner.flow_tap = None
