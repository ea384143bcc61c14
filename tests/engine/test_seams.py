"""What upstream must still do: a seam that vLLM renames fails here with a name, not deep in an engine."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.plugins
from vllm.config import ParallelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.model_executor.layers.attention import Attention
from vllm.multimodal.cache import BaseMultiModalProcessorCache, LruKeyReplicatedReceiverCache
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId
from vllm.v1.core.sched.output import (
    CachedRequestData,
    KVConnectorBlockState,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.input_batch import InputBatch as InputBatchV2
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
from vllm.v1.worker.utils import AttentionGroup

from vllm_flow.engine import plugin, wire
from vllm_flow.engine.core.attention.answers import client_request_id
from vllm_flow.patches import endpoint_plugins, input_processor, output_processor, vllm_config


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (RunnerV1.get_kv_cache_spec, ["self"]),
        (RunnerV1.load_model, ["load_dummy_weights"]),
        (RunnerV1._update_states, ["scheduler_output"]),
        (RunnerV1._build_attention_metadata, ["num_scheduled_tokens", "slot_mappings"]),
        (RunnerV1._model_forward, ["input_ids", "positions", "inputs_embeds"]),
        (RunnerV1.initialize_kv_cache, ["kv_cache_config", "is_profiling"]),
        (RunnerV1.sync_and_gather_intermediate_tensors, ["num_tokens", "intermediate_tensors"]),
        (get_pp_indices, ["num_hidden_layers", "pp_rank", "pp_size"]),
        (RunnerV1.sample_tokens, ["grammar_output"]),
        (RunnerV2.get_kv_cache_spec, ["self"]),
        (RunnerV2.initialize_kv_cache, ["kv_cache_config", "is_profiling"]),
        (RunnerV2.sample_tokens, ["grammar_output"]),
        (RunnerV2.capture_model, ["profile_only"]),
        (
            DraftModelSpeculator.set_attn,
            ["model_state", "block_tables", "target_input_buffers", "target_attn_groups"],
        ),
        (AsyncModelRunnerOutput.get_output, ["self"]),
        (Attention.forward, ["query", "key", "value"]),
        (
            CPUAttentionBackendImpl.do_kv_cache_update,
            ["layer", "key", "value", "kv_cache", "slot_mapping"],
        ),
        (
            FlashAttentionImpl.do_kv_cache_update,
            ["layer", "key", "value", "kv_cache", "slot_mapping"],
        ),
        (RunnerV2.load_model, ["load_dummy_weights"]),
        (DefaultModelState.add_request, ["req_index", "new_req_data"]),
        (DefaultModelState.remove_request, ["req_id"]),
        (
            DefaultModelState.prepare_attn,
            ["input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups"],
        ),
        (DefaultModelState.prepare_attn, ["kv_cache_config", "for_capture"]),
        (prepare_inputs_to_capture, ["model_state", "block_tables", "full_cudagraph"]),
        (FlashAttentionMetadataBuilder.build, ["common_prefix_len", "fast_build"]),
        (TritonAttentionMetadataBuilder.build, ["common_prefix_len", "fast_build"]),
        (Scheduler.add_request, ["request"]),
        (Scheduler._free_blocks, ["request"]),
        (Scheduler.update_from_output, ["scheduler_output", "model_runner_output"]),
        (Scheduler.shutdown, ["self"]),
        (FullAttentionManager.get_num_blocks_to_allocate, ["request_id", "num_tokens"]),
        (FullAttentionManager.allocate_new_blocks, ["num_tokens", "num_tokens_main_model"]),
        (FullAttentionManager.cache_blocks, ["request", "num_tokens"]),
        (KVCacheSpecRegistry.register, ["kvcache_spec_cls", "manager_class"]),
        (AttentionGroup.build_metadata, ["common_attn_metadata"]),
        (InputProcessor.process_inputs, ["request_id", "prompt", "params"]),
        (OutputProcessor.add_request, ["request"]),
        (OutputProcessor.process_outputs, ["engine_core_outputs"]),
        (OutputProcessor._update_stats_from_finished, ["req_state", "finish_reason"]),
        (RequestState.make_request_output, ["finish_reason", "kv_transfer_params"]),
        (Scheduler._free_request, ["request", "delay_free_blocks"]),
        (KVCacheManager.get_computed_blocks, ["request"]),
        (KVCacheManager.free, ["request"]),
        (KVCacheManager.pop_blocks_for_free, ["request"]),
        (Scheduler._free_request_blocks, ["request"]),
        (Scheduler._allocate_encoder_inputs, ["request", "input_ids"]),
        (BlockPool.cache_full_blocks, ["num_cached_blocks", "num_full_blocks", "block_size"]),
        (BlockPool.emit_cached_block_events, ["request", "num_cached_blocks"]),
        (BlockPool._emit_block_removed_events, ["block_hashes"]),
        (BlockPool._build_block_stored_event, ["block_hashes", "extra_keys_list"]),
        (KVCacheManager.estimate_cached_tokens, ["request"]),
        (
            KVCacheCoordinator.get_num_blocks_to_allocate,
            ["request_id", "num_tokens", "new_computed_blocks", "num_encoder_tokens"],
        ),
        (BlockPool.evict_blocks, ["block_ids"]),
        (BlockPool._insert_block_hash, ["block_hash_with_group_id", "block", "num_tokens"]),
        (BaseMultiModalProcessorCache.invalidate, ["mm_hash"]),
        (LruKeyReplicatedReceiverCache.get_and_update_item, ["mm_item", "mm_hash"]),
        (EngineCoreClient.add_request, ["request"]),
        (EngineCoreClient.add_request_async, ["request"]),
        (vllm.plugins.load_endpoint_plugins, ["supported_tasks"]),
        (PunicaWrapperBase._update_prefill_metadata, ["token_lora_tensor"]),
        (LoRAKernelMeta.prepare_tensors, ["token_lora_mapping"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_a_seam_is_where_we_stand(function: Callable[..., Any], parameters: list[str]) -> None:
    assert set(parameters) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (InputBatchV2, {"req_ids", "num_computed_tokens_np", "num_scheduled_tokens"}),
        (InputBatchV2, {"seq_lens", "seq_lens_cpu_upper_bound", "num_reqs_after_padding"}),
        (SpeculativeConfig, {"method", "parallel_drafting", "enable_adaptive_verification"}),
        (CommonAttentionMetadata, {"query_start_loc", "seq_lens", "block_table_tensor"}),
        (ParallelConfig, {"worker_cls"}),
        (SchedulerConfig, {"scheduler_cls", "async_scheduling"}),
        (VllmConfig, {"additional_config"}),
        (EngineCoreOutput, {"finish_reason", "kv_transfer_params", "prefill_stats"}),
        (NewRequestData, {"req_id", "prompt_token_ids", "mm_features", "sampling_params"}),
        (
            SchedulerOutput,
            {"scheduled_spec_decode_tokens", "scheduled_encoder_inputs", "new_block_ids_to_zero"},
        ),
        (KVConnectorBlockState, {"req_ids", "boundary_state_offloads"}),
        (LoRAKernelMeta, {"no_lora_flag_cpu"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_record_has_the_fields_we_use(kind: type, names: set[str]) -> None:
    assert names <= set(inspect.signature(kind).parameters)


OF_NO_REQUEST = {
    # Of those that are over or interrupted, which a connector must take even if it never saw them.
    *("finished_req_ids", "preempted_req_ids", "num_invalid_spec_tokens"),
    # Of the step, of blocks, of pictures, or somebody else's.
    *("free_encoder_mm_hashes", "scheduled_encoder_input_stats", "has_structured_output_requests"),
    *("encoder_input_updates", "skip_drafts"),  # vLLM 0.33; pictures for workers, and of the step
    *("pending_structured_output_tokens", "kv_connector_metadata", "has_sync_kv_loads"),
    *("aux_output_connector_metadata", "ec_connector_metadata", "ec_manager_metadata"),
    *("new_block_ids_to_zero", "kv_cache_block_copies", "num_spec_tokens_to_schedule"),
    "num_common_prefix_blocks",
}
"""Fields of a step that name no request that a connector could be kept from."""


@pytest.mark.parametrize("kind", [SchedulerOutput, CachedRequestData, KVConnectorBlockState])
def test_a_step_without_some_requests_knows_every_field(kind: type) -> None:
    """Else a connector would be shown requests that it is kept from, in a field that vLLM added."""
    known = {
        SchedulerOutput: {
            *("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"),
            *("total_num_scheduled_tokens", "scheduled_spec_decode_tokens"),
            *("scheduled_encoder_inputs", "kv_connector_block_state"),
        },
        CachedRequestData: {
            *("req_ids", "resumed_req_ids", "new_token_ids", "all_token_ids"),
            *("new_block_ids", "num_computed_tokens", "num_output_tokens"),
        },
        KVConnectorBlockState: {"req_ids", "resolve_block_ids", "boundary_state_offloads"},
    }
    assert set(inspect.signature(kind).parameters) - known[kind] <= OF_NO_REQUEST


def test_an_output_takes_a_field_of_ours_to_the_scheduler() -> None:
    """Worker and scheduler may be two processes, between which outputs are pickled."""
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    setattr(output, wire.ATTENTION_FIELD, {"a": 1})
    assert wire.attention_of(pickle.loads(pickle.dumps(output))) == {"a": 1}


def test_a_step_takes_a_field_of_ours_to_the_worker() -> None:
    step = SchedulerOutput.make_empty()
    setattr(step, wire.PICTURES_FIELD, {"a": {0: "picture"}})
    setattr(step, wire.REWRITES_FIELD, {"a": {1: "rewrite"}})
    received = pickle.loads(pickle.dumps(step))
    assert wire.pictures_of(received) == {"a": {0: "picture"}}
    assert wire.rewrites_of(received) == {"a": {1: "rewrite"}}


def test_the_encoder_cache_keeps_the_books_that_we_correct() -> None:
    books = vars(EncoderCacheManager(cache_size=7))
    assert {"cached", "freeable", "freed", "num_embeds_by_hash"} <= books.keys()
    assert books["num_free_slots"] == books["num_freeable_slots"] == 7


def test_internal_ids_are_the_clients_and_nine_characters() -> None:
    request = SimpleNamespace(external_req_id=None, request_id="chatcmpl-7")
    InputProcessor.assign_request_id(request)
    assert request.request_id != "chatcmpl-7"
    assert client_request_id(request.request_id) == "chatcmpl-7"


def test_the_plugin_may_be_registered_twice_and_reverted() -> None:
    plugin.register()
    once = patched()
    plugin.register()
    assert patched() == once
    for patch in (vllm_config, input_processor, output_processor):
        patch.revert()
    for function, ours in zip(patched(), once, strict=True):
        assert function is not ours
        assert "vllm_flow" not in function.__code__.co_filename
        assert "patches" not in function.__code__.co_filename
    plugin.register()


def test_routes_with_a_body_depend_on_what_we_override() -> None:
    """The HTTP check stands on FastAPI's overrides of this one dependency."""
    from vllm.entrypoints.anthropic.api_router import router as anthropic
    from vllm.entrypoints.openai.chat_completion.api_router import router as chat
    from vllm.entrypoints.openai.completion.api_router import router as completion
    from vllm.entrypoints.openai.responses.api_router import router as responses
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    create = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    found = {
        route.path
        for router in (anthropic, chat, completion, responses)
        for route in router.routes
        if validate_json_request in [depends.dependency for depends in route.dependencies]
    }
    assert create <= found


def test_endpoint_plugins_are_left_alone_until_the_extension_is_on() -> None:
    endpoint_plugins.revert()
    plugin.register()
    assert "patches" not in vllm.plugins.load_endpoint_plugins.__code__.co_filename
    endpoint_plugins.apply(lambda: "ours")
    assert vllm.plugins.load_endpoint_plugins(("generate",)) == ["ours"]
    endpoint_plugins.revert()
    assert vllm.plugins.load_endpoint_plugins(("generate",)) == []


def patched() -> list[Callable[..., Any]]:
    """Every function that a patch of `register` wraps, as it is now."""
    return [
        VllmConfig.__post_init__,
        InputProcessor.process_inputs,
        OutputProcessor.add_request,
        OutputProcessor.process_outputs,
        OutputProcessor._update_stats_from_finished,
        RequestState.make_request_output,
    ]


def test_a_pool_finds_blocks_in_a_dictionary() -> None:
    """Several of one name in another: `bulk_pool` and `cache_keys` go by that."""
    pool = BlockPool(4, True, 16)
    assert isinstance(pool.cached_block_hash_to_block, BlockHashToBlockMap)
    first, second, third = pool.get_new_blocks(3)
    for block in (first, second):
        pool._insert_block_hash(BlockHashWithGroupId(b"one"), block, num_tokens=16)
    pool._insert_block_hash(BlockHashWithGroupId(b"two"), third, num_tokens=16)
    assert pool.cached_block_hash_to_block._cache == {
        b"one": {first.block_id: first, second.block_id: second},
        b"two": third,
    }
