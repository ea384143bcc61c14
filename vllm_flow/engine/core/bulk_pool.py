"""vLLM's block pool, handling blocks as lists instead of one by one.

With storage groups a request takes, names and frees one block per group where stock vLLM has a single block. vLLM's
pool makes several Python calls for each block, and these calls are most of what storage groups cost the host. The
methods here do the usual case for a whole list, and leave every other case to vLLM. The pool's contents afterwards are
the same as after vLLM's own methods.

Seam: ``get_new_blocks``, ``cache_full_blocks`` and ``_remove_cached_block_hashes`` of vLLM's ``BlockPool``; the
dictionary inside of its ``BlockHashToBlockMap``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

from vllm_flow.engine import adoption
from vllm_flow.engine.core import cache_keys


class BulkBlockPool(BlockPool):
    """vLLM's pool, where nobody asks for its events or metrics; see :func:`speed_up`."""

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        if self._reuse_watchers or num_blocks > self.get_num_free_blocks():
            return super().get_new_blocks(num_blocks)
        blocks: list[KVCacheBlock] = self.free_block_queue.popleft_n(num_blocks)
        named, with_more = self.cached_block_hash_to_block._cache, self.cached_block_hashes_by_block
        for block in blocks:
            key = block.block_hash
            if key is not None:
                if named.get(key) is block and block.block_id not in with_more:
                    del named[key]
                    block.reset_hash()
                else:
                    self._remove_cached_block_hashes(block)
            assert block.ref_cnt == 0
            block.ref_cnt = 1
        return blocks

    def _remove_cached_block_hashes(self, block: KVCacheBlock) -> list[BlockHashWithGroupId]:
        first = block.block_hash
        if first is None:  # and then it has no other
            return []
        named = self.cached_block_hash_to_block
        removed = []
        for key in (first, *self.cached_block_hashes_by_block.pop(block.block_id, ())):
            if named._cache.get(key) is block:
                del named._cache[key]
            elif named.pop(key, block.block_id) is None:
                continue
            removed.append(key)
        block.reset_hash()
        return removed

    def cache_full_blocks(
        self,
        request: Any,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        span = slice(num_cached_blocks, num_full_blocks)
        new = blocks[span]
        ends = range((span.start + 1) * block_size, (span.stop + 1) * block_size, block_size)
        if (
            block_mask is not None
            or block_size != self.hash_block_size
            or not cache_keys.insert_each(
                self, new, request.block_hashes[span], ends, kv_cache_group_id
            )
        ):
            super().cache_full_blocks(
                request,
                blocks,
                num_cached_blocks,
                num_full_blocks,
                block_size,
                kv_cache_group_id,
                block_mask,
            )


def speed_up(pool: BlockPool) -> None:
    """Let a pool that tells nobody of single blocks go through many at once."""
    if pool.enable_caching and not (pool.enable_kv_cache_events or pool.metrics_collector):
        adoption.adopt(pool, BulkBlockPool)
