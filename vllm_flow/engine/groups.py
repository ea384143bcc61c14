"""Which layers share a block table: a specification per storage group of consecutive layers.

Seams: a runner's ``get_kv_cache_spec``, and ``KVCacheSpecRegistry.register(spec, manager,
uniform_type_base_spec)``. vLLM's hybrid KV-cache manager does the rest: all groups draw on one block
pool, so a block that is never allocated in one is a block another request gets. What a group stores
is `storage`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from typing_extensions import Self
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_flow.engine import draft_layers, states
from vllm_flow.engine.settings import FlowSettings

logger = init_logger("vllm.vllm_flow.groups")


class _OfOneGroup:
    """What makes a specification that of a storage group; before vLLM's own class, which stores the tokens."""

    first_layer: int
    """Shallowest decoder layer of the storage group."""
    last_layer: int
    """Deepest decoder layer of the storage group."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a KV-cache group; refuses layers of different storage groups.

        vLLM takes a refusal (AssertionError) to mean "not one group". Every layer carries this
        class, the first group's too: a plain ``FullAttentionSpec`` would merge with it.
        """
        if any(spec != specs[0] for spec in specs[1:]):
            raise AssertionError("layers of different storage groups do not share a block table")
        return specs[0]

    @cached_property
    def without_layers(self) -> Self:
        """Equal for storage groups that differ in their layers alone; asked for each group in every step."""
        return replace(self, first_layer=0, last_layer=0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled by an engine core, which groups the specs of its workers before all else."""
        register()
        self.__dict__.update(state)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers are of this storage group, else vLLM would fold them into one."""
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class FlowAttentionSpec(_OfOneGroup, FullAttentionSpec):
    """Full attention whose layers are stored per group of consecutive layers."""

    first_layer: int
    last_layer: int


@dataclass(frozen=True, kw_only=True)
class FlowLatentSpec(_OfOneGroup, MLAAttentionSpec):
    """Multi-head latent attention, likewise: of each token one vector, which keys and values are made of."""

    first_layer: int
    last_layer: int


GroupSpec: TypeAlias = FlowAttentionSpec | FlowLatentSpec
_SPEC_OF: dict[type[KVCacheSpec], type[GroupSpec]] = {
    FullAttentionSpec: FlowAttentionSpec,
    MLAAttentionSpec: FlowLatentSpec,
}


def register() -> None:
    """Tell vLLM in this process which manager a storage group has; may be called more than once.

    Called wherever vLLM is about to group layers or to build managers: by :func:`group_specs` in a
    worker, by the scheduler, and by the specs themselves on arrival in an engine core whose workers
    are other processes.
    """
    from vllm_flow.engine.core.storage import FlowAttentionManager  # which knows the spec

    # The registry fills itself with vLLM's own specs only while it is empty; this call makes it do
    # so before ours goes in.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    for spec in _SPEC_OF.values():
        KVCacheSpecRegistry.register(spec, FlowAttentionManager, uniform_type_base_spec=spec)


def group_specs(specs: Mapping[str, KVCacheSpec], settings: FlowSettings) -> dict[str, KVCacheSpec]:
    """Give each attention layer the spec of its storage group; states stay where vLLM keeps them.

    Args:
        specs: layer name -> spec, as the model runner collected them.

    A sliding window is stored like full attention, as vLLM itself does where it has no manager for windows:
    the attention looks no further back than its window in what is stored, which past a cliff are kept tokens.
    What lies outside a window is not freed. So are chunks of local attention (Llama 4): the layer's own metadata
    divide what is stored into chunks, which past a cliff count kept tokens.

    Layers whose keys differ in size (Gemma 4) are padded to the largest, so that a block holds as many tokens in
    each: vLLM would give them blocks of different lengths.

    Raises:
        ValueError: a layer uses neither full attention, latent or not, nor a sliding window, or layers of one
            storage group store keys of different sizes.
    """
    register()
    grouped: dict[str, GroupSpec] = {}
    for name, spec in specs.items():
        if isinstance(spec, MambaSpec) and spec.mamba_type.name in states.TESTED:
            continue
        if type(spec) is SlidingWindowSpec:
            logger.info_once(
                "Sliding windows: past the cliff they count kept tokens, and no blocks outside of them are "
                "freed, with or without a policy."
            )
            spec = replace_as(
                spec, FullAttentionSpec, drop=("extra_retained_tokens",), sliding_window=None
            )
        elif type(spec) is ChunkedLocalAttentionSpec:
            logger.info_once(
                "Local attention: past the cliff its chunks count kept tokens, and no blocks of earlier chunks "
                "are freed, with or without a policy."
            )
            spec = replace_as(spec, FullAttentionSpec, attention_chunk_size=None)
        kind = _SPEC_OF.get(type(spec))
        if kind is None or spec.sliding_window is not None or spec.tokens_per_state != 1:
            raise ValueError(
                f"vLLM-Flow evicts from full, sliding-window and chunked local attention, Gated DeltaNet, Mamba 2 "
                f"and short convolutions, but layer {name!r} stores {type(spec).__name__}; serve this model without "
                "additional_config['vllm_flow']."
            )
        first, last = settings.group_of(storage_layer(name, settings))
        grouped[name] = replace_as(spec, kind, first_layer=first, last_layer=last)
    padded = _padded(grouped)
    return {name: padded.get(name) or _between_steps(spec) for name, spec in specs.items()}


def _between_steps(spec: KVCacheSpec) -> KVCacheSpec:
    """States kept for the prefix cache at the end of steps alone: Mamba 2 keeps one from within a step, too.

    Where in a step that is, vLLM's metadata say by tokens of the prompt, of which some have left.
    """
    if not isinstance(spec, MambaSpec) or not spec.num_prefill_checkpoint_blocks:
        return spec
    return replace(spec, num_prefill_checkpoint_blocks=0)


def storage_layer(name: str, settings: FlowSettings) -> int:
    """Where the layer of this name comes in storage; see :func:`vllm_flow.engine.draft_layers.storage_layer`."""
    number = extract_layer_index(name)
    return draft_layers.storage_layer(
        name, number, settings.num_layers, settings.engine.draft_layers
    )


def _padded(specs: dict[str, GroupSpec]) -> dict[str, GroupSpec]:
    largest = max((spec.page_size_bytes for spec in specs.values()), default=0)
    of_group: dict[int, GroupSpec] = {}
    for name, spec in specs.items():
        if of_group.setdefault(spec.first_layer, spec) != spec:
            raise ValueError(
                f"vLLM-Flow stores layers of one group alike, but the keys of layer {name!r} differ in size from "
                f"those of layer {spec.first_layer}: set additional_config['vllm_flow']['group_layers'] to 1."
            )
    return {
        name: spec if spec.page_size_bytes == largest else replace(spec, page_size_padded=largest)
        for name, spec in specs.items()
    }
