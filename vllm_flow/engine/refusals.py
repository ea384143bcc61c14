"""Options of vLLM that eviction has not been shown to be exact with: what each is called, and the remedy.

A table. What takes more than a look at the finished ``VllmConfig``, or says more than one thing: `support`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _graphs(config: Any) -> str:
    return str(config.compilation_config.cudagraph_mode.name)


def _mode(config: Any) -> str:
    return str(config.compilation_config.mode.name)


def _attention_compiled_in(config: Any) -> bool:
    """Whether attention is no boundary of the compiled pieces; on CPU there are no pieces."""
    compilation = config.compilation_config
    return _mode(config) == "VLLM_COMPILE" and not compilation.splitting_ops_contain_attention()


def _breakable_graphs(config: Any) -> bool:
    from vllm import envs

    return bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH) and "PIECEWISE" in _graphs(config)


def _more_than_one(name: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config.parallel_config, name, 1) > 1


def _finer_hashes(cache: Any) -> bool:
    """Whether tokens are hashed in other units than blocks; hashed they are for prefix caching alone."""
    return bool(cache.enable_prefix_caching) and cache.prefix_match_unit not in (
        None,
        cache.block_size,
    )


def _prefetches(offload: Any) -> bool:
    """Whether weights of layers are copied to the device while the layers before them run."""
    wanted: bool = offload.prefetch.offload_group_size > 0
    return wanted and offload.offload_backend != "uva"


def shares_experts(config: Any) -> bool:
    """Whether engines compute experts for one another; see ``shared_experts.py``."""
    return bool(config.model_config.is_moe) and config.parallel_config.data_parallel_size > 1


def _sharing(wrong: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda config: shares_experts(config) and wrong(config)


def _other_front_end(_: Any) -> bool:
    from vllm import envs

    return bool(envs.VLLM_USE_RUST_FRONTEND)


REFUSALS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    (
        "vLLM's front end in Rust, which reads no policies: unset VLLM_USE_RUST_FRONTEND.",
        _other_front_end,
    ),
    (
        "torch.compile of the whole model, which leaves no step to run eagerly: leave out the mode "
        "of compilation_config (--compilation-config), whose default compiles the decoder.",
        lambda config: _mode(config) == "STOCK_TORCH_COMPILE",
    ),
    (
        "graphs that Inductor partitions: leave out use_inductor_graph_partition of "
        "compilation_config (--compilation-config).",
        lambda config: bool(config.compilation_config.use_inductor_graph_partition),
    ),
    (
        "attention inside compiled pieces: leave out splitting_ops and fuse_attn_quant of "
        "compilation_config (--compilation-config).",
        _attention_compiled_in,
    ),
    (
        "full CUDA graphs of steps with prompt tokens, whose rows differ from layer to layer: leave "
        'out cudagraph_mode, or set it to "FULL_AND_PIECEWISE" or "FULL_DECODE_ONLY" in '
        "compilation_config (--compilation-config).",
        lambda config: _graphs(config) == "FULL",
    ),
    (
        "full CUDA graphs with Model Runner V1: leave VLLM_USE_V2_MODEL_RUNNER unset, or pass "
        'compilation_config={"cudagraph_mode": "PIECEWISE"} (--compilation-config).',
        lambda config: "FULL" in _graphs(config) and not config.use_v2_model_runner,
    ),
    (
        "breakable CUDA graphs, which replay a step whatever leaves in it: set "
        "VLLM_USE_BREAKABLE_CUDAGRAPH=0.",
        _breakable_graphs,
    ),
    (
        "decode context parallelism: set decode_context_parallel_size=1.",
        _more_than_one("decode_context_parallel_size"),
    ),
    (
        "prefill context parallelism: set prefill_context_parallel_size=1.",
        _more_than_one("prefill_context_parallel_size"),
    ),
    (
        "data parallelism of a model with experts by other kernels than those that gather rows by their number: "
        'leave out all2all_backend, or set it to "allgather_reducescatter".',
        _sharing(
            lambda config: config.parallel_config.all2all_backend != "allgather_reducescatter"
        ),
    ),
    (
        "data and tensor parallelism of a model with experts whose workers share rows out among themselves: set "
        "tensor_parallel_size=1, or leave out enable_expert_parallel.",
        _sharing(lambda config: config.parallel_config.use_sequence_parallel_moe),
    ),
    (
        "elastic expert parallelism, whose engines come and go: leave out enable_elastic_ep.",
        lambda config: bool(config.parallel_config.enable_elastic_ep),
    ),
    (
        "LoRA beside data parallelism of a model with experts: leave out enable_lora, or set "
        "data_parallel_size=1.",
        _sharing(lambda config: config.lora_config is not None),
    ),
    (
        "speculative decoding beside data parallelism of a model with experts: leave out speculative_config, or "
        "set data_parallel_size=1.",
        _sharing(lambda config: config.speculative_config is not None),
    ),
    (
        "routed experts in responses, which are kept by rows of a whole step: leave out "
        "enable_return_routed_experts.",
        lambda config: bool(config.aux_output_config.enabled),
    ),
    (
        "prefetched weights, whose order breaks where a layer has no rows: leave out offload_group_size, or "
        "offload with cpu_offload_gb.",
        lambda config: _prefetches(config.offload_config),
    ),
    (
        "dual-batch overlap: leave out enable_dbo.",
        lambda config: config.parallel_config.use_ubatching,
    ),
    (
        "encoder-cache connectors: leave out ec_transfer_config.",
        lambda config: config.ec_transfer_config is not None,
    ),
    (
        "encoder cache managers other than vLLM's own: leave out ec_manager_config.",
        lambda config: config.ec_manager_config.encoder_cache_manager_cls is not None,
    ),
    (
        "KV-sharing fast prefill: leave out kv_sharing_fast_prefill.",
        lambda config: config.cache_config.kv_sharing_fast_prefill,
    ),
    (
        "pooling models: it evicts while text is generated.",
        lambda config: config.model_config.runner_type != "generate",
    ),
    (
        "encoder-decoder models: their image is no part of the decoder's prompt.",
        lambda config: config.model_config.is_encoder_decoder,
    ),
    (
        "video pruning, which renumbers the tokens it leaves: leave out video_pruning_rate.",
        lambda config: bool(
            getattr(config.model_config.multimodal_config, "video_pruning_rate", None)
        ),
    ),
    (
        "a disabled hybrid KV-cache manager: leave out disable_hybrid_kv_cache_manager.",
        lambda config: bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
    ),
    (
        "prefix_match_unit, since a prefix is found by whole blocks: leave it out, or set it to the "
        "block size.",
        lambda config: _finer_hashes(config.cache_config),
    ),
    (
        "instances that run the vision tower alone, in which there is nothing to evict: leave out "
        "mm_encoder_only.",
        lambda config: config.is_mm_encoder_only,
    ),
)
"""What a sentence that begins "vLLM-Flow does not support" ends with, and whether it applies."""
