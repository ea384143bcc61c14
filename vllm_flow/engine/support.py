"""Refuses at start-up what this version cannot serve, each with a sentence.

Reads a finished ``VllmConfig``; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_flow.engine import drafts, mutual_attention, pipeline, states
from vllm_flow.engine.refusals import REFUSALS

TESTED_VLLM = ("0.32.0", "0.34.0")
"""Tested range of vLLM: from the first, up to but without the second."""

NEXT_VLLM = "0.33.0"
"""The version that has no CPU build yet; see ``make test-next-vllm``."""

FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""Types of keys and values that are numbers of eight bits with one scale per layer."""

HOW_TESTED = {
    "0.32": "the whole test suite, on its CPU build, and the CUDA tests on an H100",
    "0.33": "seams, start-up, exactness, compiled steps, prefix caching, KV-cache events, request lifecycles, "
    "KV connectors, LoRA, drafters, prompt logprobs and embeddings, five model families, with latent "
    "attention and Qwen3.5's states among them, its Python over 0.32's CPU binaries; it has no CPU build yet",
}
"""Minor version -> what ran with it; on a GPU what docs/cuda.md says."""


def check_supported(vllm_config: Any, vllm_version: str) -> None:
    """Refuse what eviction has not been shown to be exact with.

    Raises:
        ValueError: a sentence that names the feature and what to do instead.
    """
    from vllm_flow.engine import families
    from vllm_flow.engine.setting_values import CONFIG_KEY

    check_version(vllm_version)
    options = vllm_config.additional_config.get(CONFIG_KEY)
    untested = isinstance(options, dict) and options.get(families.UNTESTED) is True
    families.check_supported(vllm_config.model_config, untested)
    # First, since a connector may have had vLLM turn off what is asked for below.
    for reason_against in _REASONS:
        reason = reason_against(vllm_config)
        if reason is not None:
            raise ValueError(f"vLLM-Flow does not support {reason}")
    for sentence, applies in REFUSALS:
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


def stored_keys(config: Any) -> str | None:
    """Why storage groups cannot hold keys of the configured type, None if they can."""
    cache = config.cache_config
    if cache.cache_dtype not in ("auto", "bfloat16", "float16", *FP8):
        return (
            f"kv_cache_dtype={cache.cache_dtype!r}, whose slots hold packed numbers or scales of their "
            "own: set it to 'fp8', or leave it at 'auto'."
        )
    if cache.cache_dtype in FP8 and cache.kv_cache_dtype_skip_layers:
        return (
            "layers with keys of another type than the others', since those of a storage group share "
            "blocks: leave out kv_cache_dtype_skip_layers."
        )
    return None


UNFIT_CONNECTORS = {
    "SimpleCPUOffloadConnector": "copies blocks from the pool without asking whose they are",
    "HiSparseConnector": "moves blocks of sparse attention by a table of its own",
    "ExampleHiddenStatesConnector": "stores hidden states of rows that were evicted",
}
"""Connectors that support vLLM's hybrid KV cache manager, and would see packed blocks all the same."""


def connection(config: Any) -> str | None:
    """Why a KV connector cannot be used by requests without a policy, None if it can."""
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None
    if config.model_config.use_mla:
        return (
            "KV connectors beside latent attention, whose blocks nobody has handed over: leave out "
            "kv_transfer_config."
        )
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    instead = "use 'OffloadingConnector' or another one, or leave out kv_transfer_config."
    for name in _connectors(transfer):
        if name in UNFIT_CONNECTORS:
            return f"the KV connector {name!r}, which {UNFIT_CONNECTORS[name]}: {instead}"
    if not KVConnectorFactory.supports_hma_config(transfer):
        return (
            f"the KV connector {transfer.kv_connector!r}, which knows one block table per request and "
            f"not one per storage group (vLLM's SupportsHMA): {instead}"
        )
    return None


def _connectors(transfer: Any) -> list[str]:
    """A connector's name, and those of the ones it consists of."""
    parts = transfer.kv_connector_extra_config.get("connectors") or ()
    return [transfer.kv_connector, *(part.get("kv_connector") for part in parts)]


_REASONS: tuple[Callable[[Any], str | None], ...] = (
    drafts.reason_against,
    stored_keys,
    connection,
    mutual_attention.reason_against,
    states.reason_against,
    pipeline.reason_against,
)
