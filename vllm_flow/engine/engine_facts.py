"""Reads off an engine's configuration what the settings need beside the operator's options."""

from __future__ import annotations

from typing import Any


def keys_differ(model_config: Any, num_layers: int) -> bool:
    """Whether some decoder layers store larger keys and values than others do."""
    shape, text = model_config.model_arch_config, model_config.hf_text_config
    sizes = {(shape[at].head_size, shape[at].total_num_kv_heads) for at in range(num_layers)}
    if any(getattr(text, "hybrid_layer_pattern", None) or ()):
        # MiMo-V2's layers with a window, of which vLLM's table of layers knows nothing.
        sizes.add((text.swa_head_dim, text.swa_num_key_value_heads))
    return len(sizes) > 1


def hands_over(vllm_config: Any) -> bool:
    """Whether a KV connector takes requests that evict, too."""
    from vllm_flow.engine import connectors

    return connectors.hands_over(vllm_config.kv_transfer_config)


def mm_embeds(model_config: Any) -> bool:
    """Whether requests may bring pictures as embeddings, which no tower of the engine has seen."""
    return bool(getattr(model_config.multimodal_config, "enable_mm_embeds", False))


def step_tokens(scheduler: Any, drafts: int) -> int:
    """Tokens of one request that a step has room for while every other one decodes, with so many drafts.

    Args:
        scheduler: vLLM's finished ``SchedulerConfig``.
    """
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    tokens: int = max(budget - (scheduler.max_num_seqs - 1) * (1 + drafts), 1)
    threshold = scheduler.long_prefill_token_threshold
    return min(tokens, threshold) if threshold > 0 else tokens


def served_name(model_config: Any) -> str:
    """The name under which a model is served; of several the first, which vLLM takes where none is asked for."""
    name = model_config.served_model_name or model_config.model
    return name if isinstance(name, str) else name[0]
