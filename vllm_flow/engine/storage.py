"""Storage groups: consecutive layers with a block table of their own, packed past the cliff.

Seam: ``KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec)``. vLLM's hybrid KV-cache
manager does the rest: all groups draw on one block pool, so a block that is never allocated here
is a block another request gets.

Knows layouts, not runners. The scheduler hands every manager its book of layouts
(:meth:`FlowAttentionManager.use_layouts`), since vLLM tells a manager only a request's id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_flow.engine.settings import FlowSettings
from vllm_flow.plan import TokenLayout


@dataclass(frozen=True, kw_only=True)
class FlowAttentionSpec(FullAttentionSpec):
    """Full attention whose layers are stored per group of consecutive layers."""

    first_layer: int
    """Shallowest decoder layer of the storage group."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a KV-cache group; refuses layers of different storage groups.

        vLLM takes a refusal (AssertionError) to mean "not one group". Every layer carries this
        class, the first group's too: a plain ``FullAttentionSpec`` would merge with it.
        """
        if any(spec != specs[0] for spec in specs[1:]):
            raise AssertionError("layers of different storage groups do not share a block table")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers are of this storage group, else vLLM would fold them into one."""
        return all(spec == self for spec in kv_cache_specs.values())


class FlowAttentionManager(FullAttentionManager):
    """Allocates blocks for the tokens a storage group keeps: all, or the packed text past a cliff."""

    _layouts: Mapping[str, TokenLayout] = {}

    def use_layouts(self, layouts: Mapping[str, TokenLayout]) -> None:
        """Share the scheduler's live mapping from request id to layout."""
        self._layouts = layouts

    def stored_tokens(self, request_id: str, num_tokens: int) -> int:
        """Slots that the request's first ``num_tokens`` tokens need in this group."""
        layout = self._layouts.get(request_id)
        if layout is None:
            return num_tokens
        return layout.stored_tokens(num_tokens, self.kv_cache_spec.first_layer)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        return super().get_num_blocks_to_allocate(
            request_id,
            self.stored_tokens(request_id, num_tokens),
            new_computed_blocks,
            *args,
            **kwargs,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        return super().allocate_new_blocks(
            request_id, self.stored_tokens(request_id, num_tokens), num_tokens_main_model
        )

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Leave a policy's blocks out of the prefix cache.

        Keys and values of text after the image depend on the policy in every layer past the
        cliff, so a block found by its tokens alone would be wrong for anybody else.
        """
        if request.request_id not in self._layouts:
            super().cache_blocks(request, *args, **kwargs)


def group_specs(
    specs: Mapping[str, KVCacheSpec], settings: FlowSettings
) -> dict[str, FlowAttentionSpec]:
    """Give each attention layer the spec of its storage group.

    Args:
        specs: layer name -> spec, as the model runner collected them.

    Raises:
        ValueError: a layer does not use plain full attention.
    """
    grouped = {}
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            raise ValueError(
                f"vLLM-Flow evicts from full attention only, but layer {name!r} stores "
                f"{type(spec).__name__}; serve this model without additional_config['vllm_flow']."
            )
        layer = extract_layer_index(name)
        grouped[name] = replace_as(
            spec, FlowAttentionSpec, first_layer=settings.group_start(layer)
        )
    return grouped


def managers_of(managers: Collection[Any]) -> list[FlowAttentionManager]:
    """The managers, checked to be ours: vLLM would silently fold groups it thinks equal."""
    if not all(isinstance(manager, FlowAttentionManager) for manager in managers):
        kinds = sorted({type(manager).__name__ for manager in managers})
        raise RuntimeError(
            f"vLLM built the KV-cache managers {kinds} instead of storage groups; "
            "please report this with your vLLM version."
        )
    return list(managers)


# The registry fills itself with vLLM's own specs only while it is empty; this call makes it do so
# before ours goes in.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(
    FlowAttentionSpec, FlowAttentionManager, uniform_type_base_spec=FlowAttentionSpec
)
