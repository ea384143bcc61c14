"""What an engine is, as far as settings and policies go by it: read once off its configuration.

Seam: vLLM's finished ``VllmConfig`` and ``ModelConfig``. None of it is an operator's setting of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm_flow.engine import obstacles, pipeline, states
from vllm_flow.engine.draft_layers import drafter_layers
from vllm_flow.grouping import DecoderLayers

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class EngineFacts:
    """A model, and the engine that runs it."""

    num_layers: int
    """Decoder layers of the model."""
    attending: tuple[int, ...] = ()
    """Layers that store keys and values, where the others keep a state per request, or nothing; empty where all
    layers do."""
    keep_states: bool = False
    """Whether those others keep a state, and not nothing."""
    keys_differ: bool = False
    """Whether some layers store larger keys and values than others do."""
    mutual_pictures: bool = False
    """Whether tokens of a picture see one another in both directions."""
    mm_embeds: bool = False
    """Whether requests may bring pictures as embeddings, which no tower of the engine has seen."""
    served_name: str = ""
    """The name under which the model is served; of several the first, which vLLM takes where none is asked for."""

    draft_layers: int = 0
    """Layers of a drafter (speculative decoding) that are stored before the model's, in the first group."""
    pipeline: tuple[int, ...] = ()
    """Decoder layers of each pipeline stage; empty where there is one."""
    quantised_keys: bool = False
    """Whether keys are stored in eight bits."""
    step_tokens: int | None = None
    """Tokens of one request that a step has room for whatever else runs; None where nobody asked."""
    connected: bool = False
    """Whether the engine has a KV connector."""
    hands_over: bool = False
    """Whether that connector takes requests that evict, too (said by its class, where all layers store keys)."""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    """What the engine's workers cannot do -> why, as far as they have said; see `obstacles`."""

    @property
    def decoder(self) -> DecoderLayers:
        """The layers as they are stored."""
        return DecoderLayers(self.num_layers, self.attending, self.draft_layers, self.pipeline)

    @classmethod
    def of_model(cls, model_config: Any) -> EngineFacts:
        """What a model says by itself.

        Args:
            model_config: vLLM's finished ``ModelConfig``.
        """
        num_layers = model_config.get_total_num_hidden_layers()
        return cls(
            num_layers=num_layers,
            attending=states.attending(model_config),
            keep_states=bool(model_config.is_hybrid),
            keys_differ=keys_differ(model_config, num_layers),
            mutual_pictures=bool(model_config.is_mm_prefix_lm),
            mm_embeds=bool(getattr(model_config.multimodal_config, "enable_mm_embeds", False)),
            served_name=served_name(model_config),
        )

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> EngineFacts:
        """What a whole engine says; of its workers' obstacles those that they have told by now."""
        found = cls.of_model(vllm_config.model_config)
        connector = vllm_config.kv_transfer_config
        return replace(
            found,
            draft_layers=drafter_layers(vllm_config),
            pipeline=pipeline.stages_of(found.num_layers, vllm_config.parallel_config),
            quantised_keys=vllm_config.cache_config.cache_dtype.startswith("fp8"),
            step_tokens=step_tokens(
                vllm_config.scheduler_config,
                vllm_config.num_speculative_tokens,
                vllm_config.num_prefill_lookahead_tokens,
                drafting_slots(vllm_config.speculative_config),
            ),
            connected=getattr(connector, "kv_connector", None) is not None,
            # What becomes of states, nobody has tried.
            hands_over=not found.attending and _hands_over(connector),
            obstacles=obstacles.known(vllm_config),
        )


def keys_differ(model_config: Any, num_layers: int) -> bool:
    """Whether some decoder layers store larger keys and values than others do."""
    shape, text = model_config.model_arch_config, model_config.hf_text_config
    sizes = {(shape[at].head_size, shape[at].total_num_kv_heads) for at in range(num_layers)}
    if any(getattr(text, "hybrid_layer_pattern", None) or ()):
        # MiMo-V2's layers with a window, of which vLLM's table of layers knows nothing.
        sizes.add((text.swa_head_dim, text.swa_num_key_value_heads))
    return len(sizes) > 1


def step_tokens(scheduler: Any, drafts: int, ahead: int = 0, slots: int = 0) -> int:
    """Tokens of one request that a step has room for while every other one decodes, with so many drafts.

    Args:
        scheduler: vLLM's finished ``SchedulerConfig``.
        ahead: tokens behind a chunk whose embeddings a drafter reads, so that the chunk before ends earlier.
        slots: of a step's input that each of its requests takes beside its tokens.
    """
    inputs: int = scheduler.max_num_batched_tokens
    budget: int = scheduler.max_num_scheduled_tokens or inputs
    others = scheduler.max_num_seqs - 1
    taken = others * (1 + drafts)
    tokens = max(min(budget - taken, inputs - taken - (others + 1) * slots), 1)
    threshold = scheduler.long_prefill_token_threshold
    tokens = min(tokens, threshold) if threshold > 0 else tokens
    return max(tokens - ahead, 1)


def drafting_slots(speculative: Any) -> int:
    """Of a step's input, what a drafter takes of each request beside its tokens: a draft model keeps its last one."""
    return 0 if speculative is None else int(speculative.max_num_new_slots_for_drafting)


def served_name(model_config: Any) -> str:
    """The name under which a model is served; of several the first."""
    name = model_config.served_model_name or model_config.model
    return name if isinstance(name, str) else name[0]


def _hands_over(connector: Any) -> bool:
    from vllm_flow.engine.core import connectors

    return connectors.hands_over(connector)
