"""Storage groups: consecutive layers with a block table of their own, packed past the cliff.

Seam: ``KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec)``. vLLM's hybrid KV-cache
manager does the rest: all groups draw on one block pool, so a block that is never allocated here
is a block another request gets. Terms, with a drawing: docs/glossary.md.

Knows layouts, not runners. The scheduler hands every manager its book of layouts
(:meth:`FlowAttentionManager.use_layouts`), since vLLM tells a manager only a request's id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_flow.engine.settings import FlowSettings
from vllm_flow.layout import TokenLayout, packed_boundary

POSITION, COMPLETED, TAIL = 0, 1 << 16, 2 << 16
"""Kinds of keys in the prefix cache, as offsets to the group id that vLLM appends to a hash.

A prefix names by position the block of its last tokens (as in stock vLLM), as COMPLETED the packed
block it made full, as TAIL the packed block it fills in part: three blocks, three keys. A key
promises what the block holds for whoever has the prefix, whichever request wrote it.
"""


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

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers are of this storage group, else vLLM would fold them into one."""
        return all(spec == self for spec in kv_cache_specs.values())


class FlowAttentionManager(FullAttentionManager):
    """Allocates blocks for the tokens a storage group keeps, and shares them by policy.

    For a request that evicts, a group is one of three kinds:

    - *whole*: every layer lies before the cliff. Blocks hold tokens by position, as in stock vLLM.
    - *packed*: no layer does. Blocks hold the kept tokens by rank.
    - *mixed*: the cliff is inside. Blocks hold tokens by position for some layers and by rank for
      the others, so tokens generated later are written into early blocks.

    A prefix hit shares a block only if nobody writes it any more. Packed blocks that the prefix
    fills in part, and mixed ones from the first that is not packed full, are copied on write.
    """

    _layouts: Mapping[str, TokenLayout] = {}

    def use_layouts(self, layouts: Mapping[str, TokenLayout], in_flight: set[BlockHash]) -> None:
        """Share the scheduler's live mapping from request id to layout.

        ``in_flight`` takes the prefixes that the step being scheduled will compute, whose blocks
        can be found from the next step on.
        """
        self._layouts = layouts
        self._in_flight = in_flight
        self._copies: dict[str, int] = {}
        self._room: dict[str, int] = {}

    @property
    def spec(self) -> FlowAttentionSpec:
        return self.kv_cache_spec

    def stored_tokens(self, request_id: str, num_tokens: int) -> int:
        """Slots that the request's first ``num_tokens`` tokens need in this group."""
        layout = self._layouts.get(request_id)
        if layout is None:
            return num_tokens
        return layout.stored_tokens(num_tokens, self.spec.first_layer)

    def _shared_blocks(self, layout: TokenLayout, num_tokens: int) -> int:
        """Blocks of a hit of ``num_tokens`` that are never written again, and so can be shared."""
        return layout.stored_tokens(num_tokens, self.spec.last_layer) // self.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if num_tokens <= self._room.get(request_id, 0):
            return 0
        needed = super().get_num_blocks_to_allocate(
            request_id,
            self.stored_tokens(request_id, num_tokens),
            new_computed_blocks,
            total_computed_tokens,
            self.stored_tokens(request_id, num_local_computed_tokens),
            *args,
            **kwargs,
        )
        layout = self._layouts.get(request_id)
        if layout is not None and self._is_mixed(layout) and new_computed_blocks:
            shared = self._shared_blocks(layout, num_local_computed_tokens)
            needed += len(new_computed_blocks) - shared
        return needed

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self.stored_tokens(request_id, num_local_computed_tokens),
            num_external_computed_tokens,
        )
        layout = self._layouts.get(request_id)
        if layout is None:
            return
        if self._is_packed(layout):
            # Counts whole blocks of tokens here, see cache_blocks.
            self.num_cached_block[request_id] = num_local_computed_tokens // self.block_size
        elif self._is_mixed(layout) and new_computed_blocks:
            shared = self._shared_blocks(layout, num_local_computed_tokens)
            self._copies[request_id] = shared
            self.num_cached_block[request_id] = shared

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if num_tokens <= self._room.get(request_id, 0):
            return []
        copies = []
        first = self._copies.pop(request_id, None)
        if first is not None:
            held = self.req_to_blocks[request_id]
            copies = self.block_pool.get_new_blocks(len(held) - first)
            for index, block in enumerate(copies, start=first):
                self._apply_cow(request_id, index, held[index], block)
        blocks = super().allocate_new_blocks(
            request_id, self.stored_tokens(request_id, num_tokens), num_tokens_main_model
        )
        self._room[request_id] = self._tokens_that_fit(request_id, num_tokens)
        return copies + blocks

    def _tokens_that_fit(self, request_id: str, num_tokens: int) -> int:
        """Tokens of the request, from its start, that the blocks it holds have slots for.

        A step asks each group twice per request, and one in ``block_size`` answers is a new block.

        Args:
            num_tokens: as many are known to fit.
        """
        slots = len(self.req_to_blocks[request_id]) * self.block_size
        layout = self._layouts.get(request_id)
        if layout is None or not self._is_packed(layout):
            return slots
        return slots + layout.spans.total if num_tokens >= layout.spans.end else num_tokens

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        known = self.num_cached_block.get(request.request_id, 0)
        if num_tokens // self.block_size <= known:
            return  # most steps complete no block
        layout = self._layouts.get(request.request_id)
        if layout is None:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
            return
        # A copy runs before its step's forward pass: what is found must have been computed by
        # an earlier step, not by the one being scheduled.
        computed = min(num_tokens, request.num_computed_tokens)
        self._in_flight.update(
            request.block_hashes[computed // self.block_size : num_tokens // self.block_size]
        )
        num_tokens = computed
        if not self._is_packed(layout):
            super().cache_blocks(request, num_tokens, *args, **kwargs)
        if layout.evicts_at(self.spec.last_layer):
            for num_blocks in range(known + 1, num_tokens // self.block_size + 1):
                self._cache_boundary(request, layout, num_blocks)
                # Of a packed group: whole blocks of *tokens* that can be found.
                self.num_cached_block[request.request_id] = num_blocks

    def _cache_boundary(self, request: Request, layout: TokenLayout, num_blocks: int) -> None:
        """Make packed blocks findable from a prefix of ``num_blocks`` whole blocks of tokens."""
        boundary = packed_boundary(layout, num_blocks, self.block_size)
        held = self.req_to_blocks[request.request_id]
        for index, kind in ((boundary.completed, COMPLETED), (boundary.tail, TAIL)):
            if index is not None:
                # The pool keeps any number of keys per block and drops them with the block.
                self.block_pool._insert_block_hash(
                    make_block_hash_with_group_id(
                        request.block_hashes[num_blocks - 1], kind + self.kv_cache_group_id
                    ),
                    held[index],
                    num_tokens=num_blocks * self.block_size,
                )

    def find_cached(self, prefix: BlockHash, kind: int) -> KVCacheBlock | None:
        """The block that a prefix's hash names, by position or as :data:`COMPLETED` or `TAIL`."""
        found = self.block_pool.get_cached_block(prefix, [kind + self.kv_cache_group_id])
        return found[0] if found else None

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._copies.pop(request_id, None)
        self._room.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _is_packed(self, layout: TokenLayout) -> bool:
        """Whether no layer of this group sees the image."""
        return layout.evicts_at(self.spec.first_layer)

    def _is_mixed(self, layout: TokenLayout) -> bool:
        """Whether the cliff lies inside this group."""
        return not self._is_packed(layout) and layout.evicts_at(self.spec.last_layer)


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
        first = settings.group_start(extract_layer_index(name))
        grouped[name] = replace_as(
            spec,
            FlowAttentionSpec,
            first_layer=first,
            last_layer=first + settings.group_layers - 1,
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
