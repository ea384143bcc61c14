"""Speculative decoding: which ways of drafting are served beside eviction, and why others are refused.

The target checks what a drafter proposes, as always, so answers do not depend on the drafter. Where a drafter's layers
are stored: `draft_layers`. What it reads of a target whose image rows have left: `aux_hidden_states`.

Under asynchronous scheduling only the device knows how many drafts were accepted, and the host plans a step as if all
had been. Rejected drafts come after the images, so packed lengths are too long by exactly their number, which the
device subtracts: see ``rejected_tokens`` in `metadata`, and `decode_graphs` for captured steps.

Knows no requests and takes no step.
"""

from __future__ import annotations

from typing import Any

OF_TEXT = ("ngram",)
"""Methods that propose what stood in a text before, and store nothing."""
WITH_LAYERS = ("eagle", "eagle3", "mtp", "draft_model")
"""Methods whose drafters are models with keys and values of their own."""
OF_HIDDEN_STATES = ("eagle", "eagle3", "mtp")
"""Those of them that are given the target's hidden states."""
METHODS = (*OF_TEXT, *WITH_LAYERS)
ALSO_V2 = ("ngram_gpu",)
"""Methods under Model Runner V2 alone, where this one is another name of ngram."""


def reason_against(config: Any) -> str | None:
    """Why drafts cannot be checked with eviction, to go on after "vLLM-Flow does not support"; None if they can.

    Args:
        config: vLLM's finished ``VllmConfig``.
    """
    speculative = config.speculative_config
    if speculative is None:
        return None
    method = speculative.method
    others = ", ".join(map(repr, METHODS))
    if method not in (*METHODS, *(ALSO_V2 if config.use_v2_model_runner else ())):
        return (
            f"speculative decoding by {method!r}, which was not shown to be exact with eviction: set the method of "
            f"speculative_config to one of {others}, or leave it out."
        )
    if speculative.enable_adaptive_verification:
        return (
            "adaptive verification of drafts, of which the device alone knows which rows are whose: leave "
            "enable_adaptive_verification out of speculative_config."
        )
    if method in ALSO_V2 and config.model_config.use_mla:
        # vLLM's CPU_MLA takes rows of drafts for a prompt's, policy or not, and its lengths from the host.
        return (
            f"{method!r} beside latent attention, which asynchronous scheduling tells too many tokens: set the method "
            "of speculative_config to 'ngram', or leave it out."
        )
    return _against_layers(config) if method in WITH_LAYERS else None


def _against_layers(config: Any) -> str | None:
    """Why a drafter's layers cannot be stored beside the target's."""
    speculative, target = config.speculative_config, config.model_config
    for sentence, applies in (
        (
            "drafters that read the target's keys, which are stored packed: set the method of speculative_config "
            "to 'ngram', or leave it out.",
            speculative.use_gemma4_mtp(),
        ),
        (
            "drafters with layers of several kinds, each with tokens of its own: set the method of "
            "speculative_config to 'ngram', or leave it out.",
            speculative.use_step3p5_mtp() or speculative.use_multi_module_mtp(),
        ),
        (
            "parallel drafting, which nobody has tried: leave parallel_drafting out of speculative_config.",
            speculative.parallel_drafting,
        ),
        (
            "drafters with keys of their own beside latent attention: set the method of speculative_config to "
            "'ngram', or leave it out.",
            target.use_mla,
        ),
        (
            "drafters with keys of their own beside pictures whose tokens see one another: set the method of "
            "speculative_config to 'ngram', or leave it out.",
            target.is_mm_prefix_lm,
        ),
        (
            # vLLM then turns its hybrid KV-cache manager off, on which storage groups stand.
            "drafters that read the target's hidden states beside chunks of local attention: set the method of "
            "speculative_config to 'ngram' or 'draft_model', or leave it out.",
            speculative.method in OF_HIDDEN_STATES and target.attention_chunk_size is not None,
        ),
        (
            "KV connectors beside a drafter with keys of its own: leave out kv_transfer_config, or set the method "
            "of speculative_config to 'ngram'.",
            config.kv_transfer_config is not None,
        ),
    ):
        if applies:
            return sentence
    return None


def is_drafters_config(config: Any) -> bool:
    """Whether this ``VllmConfig`` is a view of an engine's that a draft model is built by."""
    speculative = config.speculative_config
    return (
        speculative is not None
        and config.model_config is speculative.draft_model_config
        and config.model_config is not speculative.target_model_config
    )
