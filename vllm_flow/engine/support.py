"""What this version can serve: everything else is refused at start-up with a sentence.

Reads a finished ``VllmConfig``; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

TESTED_VLLM = ("0.32.0", "0.34.0")
"""Tested range of vLLM: from the first, up to but without the second."""

NEXT_VLLM = "0.33.0"
"""The version that has no CPU build yet; see ``make test-next-vllm``."""

HOW_TESTED = {
    "0.32": "the whole test suite, on its CPU build",
    "0.33": "seams, exactness, prefix caching and request lifecycles, its Python over 0.32's CPU "
    "binaries; it has no CPU build yet",
}
"""Minor version -> what ran with it. None of them ran on a GPU yet."""


def check_supported(vllm_config: Any, vllm_version: str) -> None:
    """Refuse what eviction has not been shown to be exact with.

    Raises:
        ValueError: a sentence that names the feature and what to do instead.
    """
    from vllm_flow.engine import families
    from vllm_flow.engine.settings import CONFIG_KEY

    check_version(vllm_version)
    options = vllm_config.additional_config.get(CONFIG_KEY)
    untested = isinstance(options, dict) and options.get(families.UNTESTED) is True
    families.check_supported(vllm_config.model_config, untested)
    for sentence, applies in _REFUSALS:
        if applies(vllm_config):
            raise ValueError(f"vLLM-Flow does not support {sentence}")


def check_version(version: str) -> None:
    """Refuse a vLLM outside the tested range."""
    from packaging.version import Version

    low, high = TESTED_VLLM
    if not Version(low) <= Version(version) < Version(high):
        raise ValueError(
            f"vLLM-Flow was tested with vLLM >= {low}, < {high} and does not support "
            f"{version}; install a tested version, or leave out additional_config['vllm_flow']."
        )


def how_tested(version: str) -> str:
    """What was run with a version in the tested range."""
    from packaging.version import Version

    return HOW_TESTED[".".join(map(str, Version(version).release[:2]))]


def check_hash_unit(hash_block_size: int, block_sizes: Sequence[int]) -> None:
    """Refuse hashes that are not one per block, which is how prefixes are found.

    The scheduler asks, since an attention backend may change the block size after start-up.

    Raises:
        ValueError: names both sizes and the setting.
    """
    if any(block_size != hash_block_size for block_size in block_sizes):
        raise ValueError(
            f"vLLM-Flow finds prefixes by whole blocks of {block_sizes[0]} tokens, but vLLM hashes "
            f"{hash_block_size} at a time; leave out prefix_match_unit, or set it to "
            f"{block_sizes[0]}."
        )


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


_REFUSALS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
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
        "pipeline parallelism: set pipeline_parallel_size=1.",
        _more_than_one("pipeline_parallel_size"),
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
        "dual-batch overlap: leave out enable_dbo.",
        lambda config: config.parallel_config.use_ubatching,
    ),
    (
        "speculative decoding: leave out speculative_config.",
        lambda config: config.speculative_config is not None,
    ),
    ("LoRA adapters: leave out enable_lora.", lambda config: config.lora_config is not None),
    (
        "offloading of the KV cache: leave out kv_offloading_size.",
        lambda config: config.cache_config.kv_offloading_size is not None,
    ),
    (
        "KV connectors: leave out kv_transfer_config.",
        lambda config: config.kv_transfer_config is not None,
    ),
    (
        "encoder-cache connectors: leave out ec_transfer_config.",
        lambda config: config.ec_transfer_config is not None,
    ),
    (
        "a quantised KV cache: leave kv_cache_dtype at 'auto'.",
        lambda config: config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"),
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
        "bidirectional attention over the image (Gemma 3, PaliGemma and others), whose ranges go by "
        "position in the prompt: leave out additional_config['vllm_flow'].",
        lambda config: config.model_config.is_mm_prefix_lm,
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
    (
        "prompt embeddings: leave out enable_prompt_embeds.",
        lambda config: config.model_config.enable_prompt_embeds,
    ),
)
