"""KV-cache events that tell, per storage group, which prefixes can be found in it.

Seam: the events of vLLM's ``BlockPool`` (``--kv-events-config``). vLLM announces a block when it is
cached and again when its key goes. Here a group may need up to three keys for one block of tokens
(see :mod:`vllm_flow.engine.core.cache_keys`), and, in vLLM too, one key may have several blocks. A
consumer is told of blocks of *tokens*, by hash and group: stored once, when the group has all that a
prefix needs there, removed once, when something of it is gone. What was stored and not removed is
then what the pool can serve, whether a consumer keeps a set or counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from vllm.distributed.kv_events import BlockStored
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHashWithGroupId,
    generate_block_hash_extra_keys,
    get_block_hash,
    get_group_id,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.request import Request

from vllm_flow.engine import adoption
from vllm_flow.engine.core.cache_keys import KINDS_APART
from vllm_flow.engine.replacing import replaced


class FlowBlockPool(BlockPool):
    """vLLM's pool, in the place of one that has events enabled; see :func:`tell`."""

    flow_announced: set[BlockHashWithGroupId]
    """Stored, as told, and not removed."""
    flow_untold: bool
    """See :func:`untold`."""

    def announce(self, request: Request, indices: Iterable[int], group: int) -> None:
        """Tell of some of a request's blocks of tokens, ascending, what is not known of a group yet."""
        keys = {
            index: make_block_hash_with_group_id(request.block_hashes[index], group)
            for index in indices
        }
        self._tell(
            request, (index for index in keys if keys[index] not in self.flow_announced), group
        )
        self.flow_announced.update(keys.values())

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[Any],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        told, self.kv_event_queue = self.kv_event_queue, []
        super().cache_full_blocks(
            request,
            blocks,
            num_cached_blocks,
            num_full_blocks,
            block_size,
            kv_cache_group_id,
            *args,
            **kwargs,
        )
        # vLLM tells of a block again that another one doubles.
        told += [event for event in self.kv_event_queue if not isinstance(event, BlockStored)]
        self.kv_event_queue = told
        if self.flow_untold:
            return
        hashes = request.block_hashes
        found = [
            index
            for index in range(
                num_cached_blocks, num_full_blocks
            )  # but for states that were not kept
            if self.get_cached_block(hashes[index], [kv_cache_group_id])
        ]
        self.announce(request, found, kv_cache_group_id)

    def emit_cached_block_events(
        self, request: Request, num_cached_blocks: int, block_size: int, kv_cache_group_id: int
    ) -> None:
        """Tell of a hit's blocks again, for ``kv_cache_report_mode="full"``.

        Args:
            num_cached_blocks: whole blocks of tokens in the hit.
        """
        known = (
            index
            for index in range(num_cached_blocks)
            if make_block_hash_with_group_id(request.block_hashes[index], kv_cache_group_id)
            in self.flow_announced
        )
        self._tell(request, known, kv_cache_group_id)

    def reset_prefix_cache(self) -> bool:
        done = super().reset_prefix_cache()
        if done:
            self.flow_announced.clear()
        return done

    def _emit_block_removed_events(self, block_hashes: list[BlockHashWithGroupId]) -> None:
        removed = []
        for key in block_hashes:
            if self.cached_block_hash_to_block.get_one_block(key) is not None:
                continue  # another block has what this one held
            told = make_block_hash_with_group_id(
                get_block_hash(key), get_group_id(key) % KINDS_APART
            )
            if told in self.flow_announced:
                self.flow_announced.remove(told)
                removed.append(told)
        super()._emit_block_removed_events(removed)

    def _tell(self, request: Request, indices: Iterable[int], group: int) -> None:
        """One event for each run of neighbouring blocks of tokens."""
        size = self.hash_block_size
        hashes = request.block_hashes
        # vLLM 0.33: what a draft model reads ahead is part of a block's hash.
        ahead = getattr(self, "num_hash_lookahead_tokens", None)
        keys_of = self._generate_event_extra_keys if ahead else generate_block_hash_extra_keys
        for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
            blocks = [index for _, index in run]
            start = blocks[0]
            more: dict[str, Any] = {}
            if ahead is not None:
                ends = ((index + 1) * size for index in blocks) if ahead else ()
                found = [self._lookahead_token_ids(request, end) for end in ends]
                more["lookahead_token_ids"] = found or None
            self.kv_event_queue.append(
                self._build_block_stored_event(
                    request,
                    block_hashes=[maybe_convert_block_hash(hashes[index]) for index in blocks],
                    parent_block_hash=(
                        maybe_convert_block_hash(hashes[start - 1]) if start else None
                    ),
                    start_token_idx=start * size,
                    end_token_idx=(blocks[-1] + 1) * size,
                    block_size=size,
                    kv_cache_group_id=group,
                    extra_keys_list=[
                        keys_of(request, index * size, (index + 1) * size, 0)[0] for index in blocks
                    ],
                    **more,
                )
            )


def tell(pool: BlockPool) -> None:
    """Let a pool that has events enabled tell them as above; others stay as they are."""
    if pool.enable_kv_cache_events:
        adoption.adopt(pool, FlowBlockPool, flow_announced=set(), flow_untold=False)


@contextmanager
def untold(pool: BlockPool) -> Iterator[None]:
    """While it lasts, nobody is told of blocks that are cached: of those that are found by more than their hash."""
    with replaced("flow_untold", [(pool, True)] if isinstance(pool, FlowBlockPool) else []):
        yield


def announce(pool: BlockPool, request: Request, first: int, last: int, group: int) -> None:
    """Tell of blocks of tokens that vLLM does not know to be cached; see :class:`FlowBlockPool`."""
    if isinstance(pool, FlowBlockPool):
        pool.announce(request, range(first, last), group)
