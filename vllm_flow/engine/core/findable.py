"""Names a storage group's blocks in the prefix cache: by position as in stock vLLM, and packed ones stage by stage.

Knows one storage group and its pool. Kinds of keys: `cache_keys`. Who looks prefixes up: `prefix`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from vllm_flow.engine.core import cache_keys
from vllm_flow.engine.core.cache_keys import completed, tail
from vllm_flow.engine.core.events import announce, untold
from vllm_flow.engine.core.prefix_keys import Prefixes
from vllm_flow.engine.groups import GroupSpec
from vllm_flow.layout import TokenLayout
from vllm_flow.layout_stages import LayoutStage


class FindableBlocks:
    """One storage group's blocks in the prefix cache, and what of each request's can be found there.

    Args:
        num_cached: vLLM's ``num_cached_block`` of the group's manager: blocks found by position, per request.
    """

    def __init__(
        self,
        spec: GroupSpec,
        pool: BlockPool,
        group: int,
        block_size: int,
        num_cached: dict[str, int],
    ) -> None:
        self.spec, self.pool, self.group, self.block_size = spec, pool, group, block_size
        self._num_cached = num_cached
        self._findable: dict[str, int] = {}
        """Of requests with a layout: whole blocks of *tokens* whose prefixes can be found here.

        ``num_cached`` counts blocks, which are blocks of tokens in a whole group only.
        """

    def cache_prefixes(
        self, request: Request, prefixes: Prefixes, held: Sequence[KVCacheBlock]
    ) -> None:
        """Make prefixes of a request with a layout findable, of which some may be already."""
        request_id, layout = request.request_id, prefixes.layout
        known = self.findable_blocks(request_id)
        last = max(known, prefixes.last)
        packs, stages, told = self.is_packed(layout), self.stages(layout), last
        if stages and layout.shareable is not None:
            # What only the same prompt finds, no router can ask for.
            told = min(last, layout.shareable // self.block_size)
        if not packs:
            self._cache_by_position(request, held, min(prefixes.last, told))
            with untold(self.pool):
                self._cache_by_position(request, held, prefixes.last)
        size = self.block_size
        for stage in stages:
            for packed in prefixes.packed(stage):
                kind = completed(stage) if packed.is_full else tail(stage)
                cache_keys.insert(
                    self.pool,
                    held[packed.index],
                    packed.keys,
                    kind,
                    self.group,
                    packed.num_blocks * size,
                )
        self._findable[request_id] = last
        if packs and self.pool.enable_kv_cache_events:  # of the others vLLM tells
            self._announce(request, layout, known, told)

    def _cache_by_position(
        self, request: Request, held: Sequence[KVCacheBlock], num_blocks: int
    ) -> None:
        known = self._num_cached.get(request.request_id, 0)
        if num_blocks <= known:
            return
        self.pool.cache_full_blocks(
            request=request,
            blocks=held,
            num_cached_blocks=known,
            num_full_blocks=num_blocks,
            block_size=self.block_size,
            kv_cache_group_id=self.group,
        )
        self._num_cached[request.request_id] = num_blocks

    def _announce(self, request: Request, layout: TokenLayout, first: int, last: int) -> None:
        """Tell of a packed group's blocks of tokens, but not of a picture before all kept tokens."""
        first_layer = self.spec.first_layer
        while first < last and not layout.stored_tokens((first + 1) * self.block_size, first_layer):
            first += 1
        announce(self.pool, request, first, last, self.group)

    def stages(self, layout: TokenLayout) -> tuple[LayoutStage, ...]:
        """The stages by which this group's layers store tokens packed, ascending."""
        return layout.stages_in(self.spec.first_layer, self.spec.last_layer)

    def findable_blocks(self, request_id: str) -> int:
        """Whole blocks of tokens of a request with a layout whose prefixes can be found."""
        return self._findable.get(request_id, 0)

    def find_cached(self, prefix: BlockHash, kind: int) -> KVCacheBlock | None:
        """The block that a prefix's hash names: see `cache_keys`."""
        return cache_keys.find(self.pool, prefix, kind, self.group)

    def set_shared(self, request_id: str, num_blocks: int) -> None:
        """Blocks of a hit that are named already; what is written behind them gets keys of its own."""
        self._num_cached[request_id] = self._findable[request_id] = num_blocks

    def forget(self, request_id: str) -> None:
        self._findable.pop(request_id, None)

    def is_packed(self, layout: TokenLayout) -> bool:
        """Whether every layer of this group is in a stage."""
        return layout.evicts_at(self.spec.first_layer)
