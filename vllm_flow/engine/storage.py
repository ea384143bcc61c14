"""What a storage group stores: all tokens before the first stage, the kept ones packed past it.

Seam: vLLM's ``FullAttentionManager``, one per KV-cache group; `groups` says which layers form one. What
happens to blocks of images that leave after the prefill: `late_blocks`.
Terms, with a drawing: docs/glossary.md.

Knows layouts, not runners. The scheduler hands every manager its book of layouts
(:meth:`FlowAttentionManager.use_layouts`), since vLLM tells a manager only a request's id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.request import Request

from vllm_flow.boundaries import blocks_taken, packed_boundary
from vllm_flow.engine.cache_keys import completed, tail
from vllm_flow.engine.events import announce
from vllm_flow.engine.late_blocks import LateBlocks
from vllm_flow.layout import TokenLayout
from vllm_flow.layout_stages import LayoutStage


class FlowAttentionManager(LateBlocks):
    """Allocates blocks for the tokens a storage group keeps, and shares them by policy.

    For a request that evicts, a group is one of three kinds:

    - *whole*: every layer lies before the first stage. Blocks hold tokens by position, as in stock
      vLLM.
    - *packed*: all layers are in one stage. Blocks hold the kept tokens by rank.
    - *mixed*: a stage begins inside. Blocks hold more tokens for some layers than for the others, so
      tokens generated later are written into early blocks.

    A prefix hit shares a block only if nobody writes it any more. Packed blocks that the prefix
    fills in part, and mixed ones from the first that is not packed full, are copied on write; where
    the pool has no room for copies, those that nobody holds are taken over instead.

    A request whose images leave after the prefill is one without a policy until then: it finds and
    shares what others without one do. With its second token, packed and mixed groups give the blocks
    of its prompt back, from the first token that leaves on, and take others for what stays.
    """

    def use_layouts(self, layouts: Mapping[str, TokenLayout], in_flight: set[BlockHash]) -> None:
        """Share the scheduler's live mapping from request id to layout.

        ``in_flight`` takes the prefixes that the step being scheduled will compute, whose blocks
        can be found from the next step on.
        """
        self._layouts = layouts
        self._in_flight = in_flight
        self._findable: dict[str, int] = {}
        """Of requests with a layout: whole blocks of *tokens* whose prefixes can be found here.

        vLLM's ``num_cached_block`` counts blocks, which are blocks of tokens in a whole group only.
        """
        self._copies: dict[str, list[int]] = {}
        self._takes_over: set[str] = set()
        self._room: dict[str, int] = {}
        self._rewritten, self._rewrites = set(), {}

    def stored_tokens(self, request_id: str, num_tokens: int) -> int:
        """Slots that the request's first ``num_tokens`` tokens need in this group."""
        layout = self._layouts.get(request_id)
        if layout is None:
            return num_tokens
        return layout.stored_tokens(num_tokens, self.spec.first_layer)

    def _shared_blocks(self, layout: TokenLayout, num_tokens: int) -> int:
        """Blocks of a hit of ``num_tokens`` that are never written again, and so can be shared."""
        return layout.stored_tokens(num_tokens, self.spec.last_layer) // self.block_size

    def take_over(self, request_id: str, wanted: bool) -> None:
        """Whether the hit just found for a request takes over the blocks it will write.

        The prefix cache forgets them until the request, one step later, has them found again.
        """
        if wanted:
            self._takes_over.add(request_id)
        else:
            self._takes_over.discard(request_id)

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
        stored = self.stored_tokens(request_id, num_tokens)
        late = self._to_rewrite(request_id, num_tokens)
        if late is not None:
            if total_computed_tokens >= late.prompt_tokens:
                return self._need(request_id, late, num_tokens).net
            # Before it answers, a request holds its prompt.
            stored = max(stored, late.prompt_tokens)
        layout = self._layout(request_id)
        if layout is not None and new_computed_blocks:
            return blocks_taken(
                -(-stored // self.block_size),
                [block.ref_cnt == 0 for block in new_computed_blocks],
                self._shared_blocks(layout, num_local_computed_tokens),
                take_over=request_id in self._takes_over,
            )
        return super().get_num_blocks_to_allocate(
            request_id,
            stored,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            **kwargs,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        layout = self._layout(request_id)
        if layout is None:
            super().add_local_computed_blocks(
                request_id,
                new_computed_blocks,
                num_local_computed_tokens,
                num_external_computed_tokens,
            )
            return
        shared = self._shared_blocks(layout, num_local_computed_tokens)
        # Whole blocks, or vLLM would arrange for a copy of its own.
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, shared * self.block_size, num_external_computed_tokens
        )
        # What is written from here on is a copy, or taken over: to be found by keys of its own.
        self.num_cached_block[request_id] = self._findable[request_id] = shared
        self._arrange_writing(request_id, new_computed_blocks, shared)

    def _arrange_writing(
        self, request_id: str, hit: Sequence[KVCacheBlock], first_written: int
    ) -> None:
        """Take a hit's blocks that will be written over, or note that they are to be copied."""
        taken = set[int]()
        if request_id in self._takes_over:
            # A use count of 1 is ours: nobody else holds the block.
            taken = {block.block_id for block in hit[first_written:] if block.ref_cnt == 1}
            self.block_pool.evict_blocks(taken)
        self._copies[request_id] = [
            index
            for index, block in enumerate(hit)
            if index >= first_written and block.block_id not in taken
        ]

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if self._layout(request_id) is not None:
            # What another engine computed is loaded whole.
            assert num_local_computed_tokens == 0
            num_external_computed_tokens = self.stored_tokens(
                request_id, num_external_computed_tokens
            )
        super().allocate_external_computed_blocks(
            request_id, num_local_computed_tokens, num_external_computed_tokens, *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if num_tokens <= self._room.get(request_id, 0):
            return []
        late = self._to_rewrite(request_id, num_tokens)
        if late is not None:
            new = self._rewrite(request_id, late, num_tokens)
            self._room[request_id] = self._tokens_that_fit(request_id, num_tokens)
            return new
        to_copy = self._copies.pop(request_id, [])
        copies = self.block_pool.get_new_blocks(len(to_copy)) if to_copy else []
        held = self.req_to_blocks[request_id]
        for index, block in zip(to_copy, copies, strict=True):
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
        if layout is not None and not layout.gone_by(num_tokens):
            return min(slots, layout.prompt_tokens)
        if layout is None or not self._is_packed(layout):
            return slots
        evicted = layout.evicted(self.spec.first_layer)
        gone = 0 if evicted is None else evicted.total
        return slots + gone if num_tokens >= layout.spans.end else num_tokens

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        request_id = request.request_id
        whole = self._layouts.get(request_id)
        if whole is not None and whole.late:
            # What it answers was computed without the image, which nobody else's is.
            num_tokens = min(num_tokens, whole.prompt_tokens)
        layout = self._layout(request_id)
        done = self.num_cached_block if layout is None else self._findable
        if layout is not None and layout.findable is not None:
            num_tokens = min(num_tokens, layout.findable)
        known = done.get(request_id, 0)
        if num_tokens // self.block_size <= known:
            return  # most steps complete no block
        if layout is None:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
            return
        # A copy runs before its step's forward pass: what is found must have been computed by
        # an earlier step, not by the one being scheduled.
        computed = min(num_tokens, request.num_computed_tokens)
        first, last = computed // self.block_size, num_tokens // self.block_size
        for index, prefix in enumerate(request.block_hashes[first:last], start=first + 1):
            self._in_flight.add(BlockHash(layout.key(prefix, index * self.block_size)))
        if not self._is_packed(layout):
            super().cache_blocks(request, computed, *args, **kwargs)
        last = max(known, computed // self.block_size)
        for num_blocks in range(known + 1, last + 1):
            self._cache_boundary(request, layout, num_blocks)
        self._findable[request_id] = last
        if self._is_packed(layout):  # vLLM knows of the others
            self._announce(request, layout, known, last)

    def _announce(self, request: Request, layout: TokenLayout, first: int, last: int) -> None:
        """Tell of a packed group's blocks of tokens, but not of a picture before all kept tokens."""
        first_layer = self.spec.first_layer
        if layout.shareable is not None:  # what only the same prompt finds, no router can ask for
            last = min(last, layout.shareable // self.block_size)
        while first < last and not layout.stored_tokens((first + 1) * self.block_size, first_layer):
            first += 1
        announce(self.block_pool, request, first, last, self.kv_cache_group_id)

    def _cache_boundary(self, request: Request, layout: TokenLayout, num_blocks: int) -> None:
        """Make packed blocks findable from a prefix of ``num_blocks`` whole blocks of tokens."""
        held = self.req_to_blocks[request.request_id]
        num_tokens = num_blocks * self.block_size
        ends = layout.may_end_at(num_tokens)
        prefix = BlockHash(layout.key(request.block_hashes[num_blocks - 1], num_tokens))
        for stage in self.stages(layout):
            boundary = packed_boundary(stage.evicted, num_blocks, self.block_size)
            keys = [(boundary.completed, completed(stage))]
            if ends:  # else no prefix ends here, though longer ones go through
                keys.append((boundary.tail, tail(stage)))
            for index, kind in keys:
                if index is None:
                    continue
                # The pool keeps any number of keys per block and drops them with the block.
                self.block_pool._insert_block_hash(
                    make_block_hash_with_group_id(prefix, kind + self.kv_cache_group_id),
                    held[index],
                    num_tokens=num_tokens,
                )

    def stages(self, layout: TokenLayout) -> tuple[LayoutStage, ...]:
        """The stages by which this group's layers store tokens packed, ascending."""
        return layout.stages_in(self.spec.first_layer, self.spec.last_layer)

    def findable_tokens(self, request_id: str) -> int:
        """Tokens of the longest prefix of a request with a layout that can be found."""
        tokens = self._findable.get(request_id, 0) * self.block_size
        return self._layouts[request_id].last_end(tokens, self.block_size)

    def find_cached(self, prefix: BlockHash, kind: int) -> KVCacheBlock | None:
        """The block that a prefix's hash names: see `cache_keys`."""
        found = self.block_pool.get_cached_block(prefix, [kind + self.kv_cache_group_id])
        return found[0] if found else None

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._findable.pop(request_id, None)
        self._copies.pop(request_id, None)
        self._takes_over.discard(request_id)
        self._room.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _is_packed(self, layout: TokenLayout) -> bool:
        """Whether every layer of this group is in a stage."""
        return layout.evicts_at(self.spec.first_layer)


def managers_of(managers: Collection[Any]) -> list[FlowAttentionManager]:
    """The managers, checked to be ours: vLLM would silently fold groups it thinks equal."""
    if not all(isinstance(manager, FlowAttentionManager) for manager in managers):
        kinds = sorted({type(manager).__name__ for manager in managers})
        raise RuntimeError(
            f"vLLM built the KV-cache managers {kinds} instead of storage groups; "
            "please report this with your vLLM version."
        )
    return list(managers)
