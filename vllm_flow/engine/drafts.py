"""Speculative decoding: what a drafter stores, and what it reads of a target whose image rows have left.

A drafter of one model's making (EAGLE's head, layers of multi-token prediction, a small model) keeps keys and
values of its own, of every token by position, whatever the target evicts. Its layers are stored as if they came
right before the target's first one, in the same storage group: no stage begins before layer 0, so to them every
request's tokens are whole, and what is counted of a group counts them too.

What it proposes is checked by the target, as always: an answer does not depend on it. Under asynchronous scheduling
how much of it was taken is known to the device alone, and a step is planned as if all had been. What was not comes
behind the images, so whatever is stored packed is as many tokens shorter: see ``behind`` in `metadata`, and of captured
steps `decode_graphs`.

Seams: the names of vLLM's attention layers, in which drafters number theirs behind the target's or under a prefix
of their own; ``_draft_attn_layer_names`` of a proposer, ``draft_attn_layer_names`` of a speculator;
``_maybe_add_hidden_state`` of vLLM's ``EagleModelMixin``, by which a decoder collects what EAGLE-3 reads between its
layers; ``num_accepted_tokens_cpu`` of Model Runner V1's batch. Knows no requests and takes no step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OF_TEXT = ("ngram",)
"""Methods that propose what stood in a text before, and store nothing."""
WITH_LAYERS = ("eagle", "eagle3", "mtp", "draft_model")
"""Methods whose drafters are models with keys and values of their own."""
OF_HIDDEN_STATES = ("eagle", "eagle3", "mtp")
"""Those of them that are given the target's hidden states."""
METHODS = (*OF_TEXT, *WITH_LAYERS)
ALSO_V2 = ("ngram_gpu",)
"""Methods under Model Runner V2 alone, where this one is another name of ngram."""
OWN_NAMES = ("draft_model.", "mtp.")
"""What names of a drafter's layers may begin with that are numbered from 0."""
COLLECTS = "_maybe_add_hidden_state"
"""vLLM's method of a decoder that keeps hidden states between layers."""


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


def layers(config: Any) -> int:
    """Decoder layers of the drafter, each with keys and values; 0 where it stores none.

    Args:
        config: vLLM's finished ``VllmConfig``.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.method not in WITH_LAYERS:
        return 0
    drafter = speculative.draft_model_config
    if speculative.method != "mtp":
        return int(drafter.get_total_num_hidden_layers())
    told = (
        getattr(config, name, None)
        for config in (drafter.hf_config, drafter.hf_text_config)
        for name in ("n_predict", "num_nextn_predict_layers")
    )
    return next((number for number in told if number), 1)


def reads_between_layers(config: Any) -> bool:
    """Whether the drafter is given hidden states from between the target's layers."""
    speculative = config.speculative_config
    if speculative is None or speculative.method != "eagle3":
        return False
    eagle = getattr(speculative.draft_model_config.hf_config, "eagle_config", None) or {}
    return bool(eagle.get("use_aux_hidden_state", True))


def is_drafters_config(config: Any) -> bool:
    """Whether this ``VllmConfig`` is a view of an engine's that a draft model is built by."""
    speculative = config.speculative_config
    return (
        speculative is not None
        and config.model_config is speculative.draft_model_config
        and config.model_config is not speculative.target_model_config
    )


def storage_layer(name: str, number: int, num_layers: int, draft_layers: int) -> int:
    """Where a layer comes in storage: the target's by their number, a drafter's below 0.

    Args:
        name: of vLLM's attention layer.
        number: the one in its name.
        num_layers: decoder layers of the target.
        draft_layers: see :func:`layers`.
    """
    if not draft_layers:
        return number
    if name.startswith(OWN_NAMES):
        return number - draft_layers
    return number if number < num_layers else number - num_layers - draft_layers


def layer_in_group(name: str, number: int, spec: Any) -> int:
    """The same, given the storage group of the layer, of a drafter's layers the group's first.

    Args:
        spec: the group's specification.
    """
    first = getattr(spec, "first_layer", 0)
    if first >= 0:
        return number
    return first if number > spec.last_layer or name.startswith(OWN_NAMES) else number


def check_layers(
    names: Collection[str], drafters: Collection[str], layer_of: Callable[[str], int]
) -> None:
    """Refuse a drafter whose layers are not where their names and its configuration say.

    Args:
        names: of all attention layers that store keys and values.
        drafters: those of them that vLLM's proposer says are its own.
        layer_of: :func:`storage_layer` by name.

    Raises:
        ValueError: names the layers.
    """
    found = {name for name in names if layer_of(name) < 0}
    if found != set(drafters):
        raise ValueError(
            f"vLLM-Flow stores a drafter's layers before the model's, but takes {sorted(found)} for its layers, and "
            f"vLLM {sorted(drafters)}: set the method of speculative_config to 'ngram', or leave it out."
        )


def collector(
    decoder: Any, whole: Callable[[torch.Tensor], torch.Tensor]
) -> list[tuple[Any, Callable[..., Any]]]:
    """What takes the place of a decoder's :data:`COLLECTS` in a step in which rows leave, as `hiding` takes it.

    Args:
        decoder: the module that runs the layers.
        whole: of a tensor of the rows alive one of all the step's, [R, H] -> [T, H].
    """
    own = getattr(decoder, COLLECTS, None)
    if own is None:
        return []

    def collect(
        collected: Any, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> Any:
        if layer not in decoder.aux_hidden_state_layers:
            return collected
        kept = hidden if residual is None else hidden + residual
        return own(collected, layer, whole(kept), None)

    return [(decoder, collect)]


def check_collects(decoder: Any) -> None:
    """Refuse EAGLE-3 where a decoder collects hidden states in a way of its own.

    Args:
        decoder: see :class:`vllm_flow.engine.families.decoder_parts.Decoder`.

    Raises:
        ValueError: names the class, and what to do.
    """
    if decoder.norm is None or not hasattr(decoder.model, COLLECTS):
        raise ValueError(
            f"vLLM-Flow does not know how {type(decoder.model).__name__} collects what EAGLE-3 reads between its "
            "layers: set the method of speculative_config to 'eagle' or 'ngram', or leave it out."
        )


def counts_by_former_rows(runner: Any) -> AbstractContextManager[None]:
    """While rows of the batch move, how many tokens each request was given stays by the rows of the step before.

    Where the prefix cache finds states and steps are scheduled ahead, Model Runner V1 of vLLM 0.32 and 0.33 looks
    these counts up by former rows, though they have moved with their requests: of a request whose row changed, it would
    go on from the state of another one's last accepted draft. So does vLLM without the extension.

    Args:
        runner: a Model Runner V1, about to update its states.
    """
    event = getattr(runner, "num_accepted_tokens_event", None)
    align = runner.vllm_config.cache_config.mamba_cache_mode == "align"
    if event is None or not runner.use_async_scheduling or not align:
        return nullcontext()
    return _counts_kept(runner.input_batch, event)


@contextmanager
def _counts_kept(batch: Any, event: Any) -> Iterator[None]:
    event.synchronize()  # the counts are on their way from the device; vLLM waits for them a moment later
    former = batch.num_accepted_tokens_cpu.copy()
    yield
    if batch.prev_req_id_to_index:  # else vLLM takes them by the rows of now
        batch.num_accepted_tokens_cpu[:] = former
