"""Under which keys a storage group's blocks are found: by position as in stock vLLM, and packed, stage by stage.

Seam: vLLM's ``FullAttentionManager``, whose other halves of ours are `storage` and `late_blocks`. Kinds of keys:
`cache_keys`. Who looks prefixes up: `prefix`.
"""

from __future__ import annotations

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from vllm_flow.engine import cache_keys
from vllm_flow.engine.cache_keys import completed, tail
from vllm_flow.engine.events import announce, untold
from vllm_flow.engine.late_blocks import LateBlocks
from vllm_flow.engine.prefix_keys import Prefixes
from vllm_flow.layout import TokenLayout
from vllm_flow.layout_stages import LayoutStage


class FindablePrefixes(LateBlocks):
    """What a storage group's manager does for the prefix cache."""

    _findable: dict[str, int]
    """Of requests with a layout: whole blocks of *tokens* whose prefixes can be found here.

    vLLM's ``num_cached_block`` counts blocks, which are blocks of tokens in a whole group only.
    """

    def cache_prefixes(self, request: Request, prefixes: Prefixes) -> None:
        """Make prefixes of a request with a layout findable, of which some may be already."""
        request_id, layout = request.request_id, prefixes.layout
        known = self.findable_blocks(request_id)
        last = max(known, prefixes.last)
        packs, stages, told = self._is_packed(layout), self.stages(layout), last
        if stages and layout.shareable is not None:
            # What only the same prompt finds, no router can ask for.
            told = min(last, layout.shareable // self.block_size)
        if not packs:
            self._cache_by_position(request, min(prefixes.last, told))
            with untold(self.block_pool):
                self._cache_by_position(request, prefixes.last)
        held, size = self.req_to_blocks[request_id], self.block_size
        for stage in stages:
            for packed in prefixes.packed(stage):
                kind = completed(stage) if packed.is_full else tail(stage)
                cache_keys.name(
                    self.block_pool,
                    held[packed.index],
                    packed.keys,
                    kind,
                    self.kv_cache_group_id,
                    packed.num_blocks * size,
                )
        self._findable[request_id] = last
        if packs and self.block_pool.enable_kv_cache_events:  # of the others vLLM tells
            self._announce(request, layout, known, told)

    def _cache_by_position(self, request: Request, num_blocks: int) -> None:
        known = self.num_cached_block.get(request.request_id, 0)
        if num_blocks <= known:
            return
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=self.req_to_blocks[request.request_id],
            num_cached_blocks=known,
            num_full_blocks=num_blocks,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = num_blocks

    def _announce(self, request: Request, layout: TokenLayout, first: int, last: int) -> None:
        """Tell of a packed group's blocks of tokens, but not of a picture before all kept tokens."""
        first_layer = self.spec.first_layer
        while first < last and not layout.stored_tokens((first + 1) * self.block_size, first_layer):
            first += 1
        announce(self.block_pool, request, first, last, self.kv_cache_group_id)

    def stages(self, layout: TokenLayout) -> tuple[LayoutStage, ...]:
        """The stages by which this group's layers store tokens packed, ascending."""
        return layout.stages_in(self.spec.first_layer, self.spec.last_layer)

    def findable_blocks(self, request_id: str) -> int:
        """Whole blocks of tokens of a request with a layout whose prefixes can be found."""
        return self._findable.get(request_id, 0)

    def find_cached(self, prefix: BlockHash, kind: int) -> KVCacheBlock | None:
        """The block that a prefix's hash names: see `cache_keys`."""
        return cache_keys.find(self.block_pool, prefix, kind, self.kv_cache_group_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._findable.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _is_packed(self, layout: TokenLayout) -> bool:
        """Whether every layer of this group is in a stage."""
        return layout.evicts_at(self.spec.first_layer)
