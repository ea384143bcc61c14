"""Models of which some layers keep a state per request in the place of keys and values: linear attention, convolutions.

Past a cliff the state of such a layer is built from the rows that stayed, just as attention there sees these rows only.
Where the state is stored does not change. So these layers stay in vLLM's own KV-cache groups, and only a step's
metadata differ: they say from how many rows the state was made so far. Where this is none, the kernel begins at zero,
whatever the block holds.

Knows vLLM's configuration and its specifications of states; takes no step.
"""

from __future__ import annotations

from typing import Any

ATTENTION = "full_attention"
STATES = ("linear_attention", "conv")
"""What a configuration calls layers with states: Gated DeltaNet and Mamba 2, and LFM2's short convolutions."""
TESTED = ("GDN_ATTN", "MAMBA2", "SHORT_CONV")
"""vLLM's names of the states that were tested, likewise."""

DRAFTS = ("ngram", "mtp")
"""Methods of speculative decoding tested beside them: what stood in a text before, and Qwen3.5's own layer."""

PERCEPTRON = "mlp"
"""What a configuration calls layers that are a perceptron alone: they keep nothing of a request."""
OTHERS = ("lfm2", "nemotron_h")
"""Types of language models with states of other kinds than Gated DeltaNet's."""
BESIDE = {
    "speculative_config": "speculative_config",
    "kv_transfer_config": "kv_transfer_config",
    "enable_lora": "lora_config",
}
"""What nobody has tried beside those: an option -> where vLLM's finished configuration has it."""


def attending(model_config: Any) -> tuple[int, ...]:
    """Layers that store keys and values where others keep states, or nothing, ascending; empty where all do.

    Args:
        model_config: vLLM's finished ``ModelConfig``.
    """
    kinds = getattr(model_config.hf_text_config, "layer_types", None) or ()
    others = STATES if model_config.is_hybrid else (PERCEPTRON,)
    if not set(others) & set(kinds):
        return ()
    return tuple(layer for layer, kind in enumerate(kinds) if kind == ATTENTION)


def is_state(spec: Any) -> bool:
    """Whether a KV-cache group of this specification holds states."""
    from vllm.v1.kv_cache_interface import MambaSpec

    return isinstance(spec, MambaSpec)


def reason_against(config: Any) -> str | None:
    """Why a model with states cannot be served as configured, to go on after "vLLM-Flow does not support".

    Args:
        config: vLLM's finished ``VllmConfig``.
    """
    if not attending(config.model_config):
        return None
    untried = _untried(config)
    if untried is not None or not config.model_config.is_hybrid:
        return untried
    drafts = config.speculative_config
    for sentence, applies in (
        (
            "speculative decoding of a model with linear attention under Model Runner V2, where nobody has tried it: "
            "set VLLM_USE_V2_MODEL_RUNNER=0, or leave out speculative_config.",
            drafts is not None and config.use_v2_model_runner,
        ),
        (
            "drafts for a model with linear attention that were not shown to be exact: set the method of "
            f"speculative_config to {' or '.join(map(repr, DRAFTS))}, or leave it out.",
            drafts is not None and drafts.method not in DRAFTS,
        ),
        (
            "speculative decoding of a model with linear attention on a CPU, where vLLM 0.32's convolutions keep "
            "wrong inputs after a step with fewer drafts than asked for, whatever is evicted, and nobody has run a "
            "later one: leave out speculative_config.",
            drafts is not None and loses_drafts(),
        ),
    ):
        if applies:
            return sentence
    return None


def loses_drafts() -> bool:
    """Whether vLLM's own kernels may go on from wrong states behind some drafts."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _untried(config: Any) -> str | None:
    """What nobody has tried beside states that are not Gated DeltaNet's, or perceptrons that are layers."""
    whose = "short convolutions or Mamba 2"
    if not config.model_config.is_hybrid:
        whose = "perceptrons that are layers of their own"
    elif config.model_config.hf_text_config.model_type not in OTHERS:
        return None
    asked = [key for key, name in BESIDE.items() if getattr(config, name) is not None]
    if not asked:
        return None
    return (
        f"speculative decoding, KV connectors and LoRA adapters of a model with {whose}, "
        f"beside which nobody has tried them: leave out {', '.join(asked)}."
    )
