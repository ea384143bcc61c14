"""Which layers share a block table: a specification per storage group of consecutive layers.

Seams: a runner's ``get_kv_cache_spec``, and ``KVCacheSpecRegistry.register(spec, manager,
uniform_type_base_spec)``. vLLM's hybrid KV-cache manager does the rest: all groups draw on one block
pool, so a block that is never allocated in one is a block another request gets. What a group stores
is `storage`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import Self
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_flow.engine import states
from vllm_flow.engine.settings import FlowSettings

logger = init_logger("vllm.vllm_flow.groups")


@dataclass(frozen=True, kw_only=True)
class FlowAttentionSpec(FullAttentionSpec):
    """Full attention whose layers are stored per group of consecutive layers."""

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

    @property
    def without_layers(self) -> Self:
        """Equal for storage groups that differ in their layers alone."""
        return replace(self, first_layer=0, last_layer=0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled by an engine core, which groups the specs of its workers before all else."""
        register()
        self.__dict__.update(state)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers are of this storage group, else vLLM would fold them into one."""
        return all(spec == self for spec in kv_cache_specs.values())


def register() -> None:
    """Tell vLLM in this process which manager a storage group has; may be called more than once.

    Called wherever vLLM is about to group layers or to build managers: by :func:`group_specs` in a
    worker, by the scheduler, and by the specs themselves on arrival in an engine core whose workers
    are other processes.
    """
    from vllm_flow.engine.storage import FlowAttentionManager  # which knows the spec

    # The registry fills itself with vLLM's own specs only while it is empty; this call makes it do
    # so before ours goes in.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(
        FlowAttentionSpec, FlowAttentionManager, uniform_type_base_spec=FlowAttentionSpec
    )


def group_specs(specs: Mapping[str, KVCacheSpec], settings: FlowSettings) -> dict[str, KVCacheSpec]:
    """Give each attention layer the spec of its storage group; states stay where vLLM keeps them.

    Args:
        specs: layer name -> spec, as the model runner collected them.

    A sliding window is stored like full attention, as vLLM itself does where it has no manager for windows:
    the attention looks no further back than its window in what is stored, which past a cliff are kept tokens.
    What lies outside a window is not freed.

    Raises:
        ValueError: a layer uses neither full attention nor a sliding window.
    """
    register()
    grouped: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        if isinstance(spec, MambaSpec) and spec.mamba_type.name == states.GATED_DELTA:
            grouped[name] = spec
            continue
        if type(spec) is SlidingWindowSpec:
            logger.info_once(
                "Sliding windows: past the cliff they count kept tokens, and no blocks outside of them are "
                "freed, with or without a policy."
            )
            spec = replace_as(
                spec, FullAttentionSpec, drop=("extra_retained_tokens",), sliding_window=None
            )
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            raise ValueError(
                f"vLLM-Flow evicts from full and sliding-window attention and from Gated DeltaNet, but layer "
                f"{name!r} stores {type(spec).__name__}; serve this model without additional_config['vllm_flow']."
            )
        first, last = settings.group_of(extract_layer_index(name))
        grouped[name] = replace_as(spec, FlowAttentionSpec, first_layer=first, last_layer=last)
    return grouped
