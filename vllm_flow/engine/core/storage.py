"""Allocates a storage group's blocks: for all tokens before the first stage, and for the kept ones, packed, past it.

Seam: vLLM's ``FullAttentionManager``, one per KV-cache group; `groups` says which layers form one. By which
keys its blocks are found: `findable`; what happens to those of images that leave after the prefill:
`late_blocks`; what all groups are asked at once: `coordination`.
Terms, with a drawing: docs/glossary.md.

Knows layouts, not runners. The scheduler hands every manager its book of layouts
(:meth:`FlowAttentionManager.use_layouts`), since vLLM tells a manager only a request's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_flow.boundaries import blocks_taken
from vllm_flow.engine.core.findable import FindableBlocks
from vllm_flow.engine.core.late_blocks import LateBlocks
from vllm_flow.engine.core.prefix_keys import Prefixes
from vllm_flow.engine.groups import GroupSpec
from vllm_flow.layout import TokenLayout, of_prompt


class FlowAttentionManager(FullAttentionManager):
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spec, pool, size = self.spec, self.block_pool, self.block_size
        self.findable = FindableBlocks(
            spec, pool, self.kv_cache_group_id, size, self.num_cached_block
        )
        self.late = LateBlocks(spec, pool, size)
        self._layouts: Mapping[str, TokenLayout] = {}
        self._copies: dict[str, list[int]] = {}
        self._takes_over: set[str] = set()

    @property
    def spec(self) -> GroupSpec:
        return self.kv_cache_spec

    def use_layouts(self, layouts: Mapping[str, TokenLayout]) -> None:
        """Share the scheduler's live mapping from request id to layout."""
        self._layouts = layouts

    def _layout(self, request_id: str) -> TokenLayout | None:
        return of_prompt(self._layouts.get(request_id))

    def packs(self, request_id: str) -> bool:
        """Whether the request has a layout that has had effect on its blocks."""
        layout = self._layouts.get(request_id)
        return layout is not None and (not layout.late or self.late.have_left(request_id))

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Not by position once the blocks hold something else: beside some drafters vLLM 0.33 knows the hash of a
        prompt's last block only with tokens behind it, when its images have left."""
        if not self.late.have_left(request.request_id):
            super().cache_blocks(request, *args, **kwargs)

    def cache_prefixes(self, request: Request, prefixes: Prefixes) -> None:
        self.findable.cache_prefixes(request, prefixes, self.req_to_blocks[request.request_id])

    def stored_tokens(
        self, request_id: str, num_tokens: int, known_tokens: int | None = None
    ) -> int:
        """Slots that the request's first ``num_tokens`` tokens need in this group.

        Args:
            known_tokens: without those at the end that are room for a drafter; None: all are known.
        """
        layout = self._layouts.get(request_id)
        known = num_tokens if known_tokens is None else known_tokens
        if layout is None or not layout.gone_by(known):
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
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        stored = self.stored_tokens(request_id, num_tokens, num_tokens_main_model)
        # Slots for drafts behind a prompt are not yet its answer.
        known = self._layouts.get(request_id)
        if self.late.leave_before(request_id, known, num_tokens_main_model):
            if total_computed_tokens >= known.prompt_tokens:
                return self.late.need(known, num_tokens, self.req_to_blocks[request_id]).net
            # Before it answers, a request holds its prompt.
            stored = max(stored, known.prompt_tokens)
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
            num_tokens_main_model,
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
        self.findable.set_shared(request_id, shared)
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
        held, known = self.req_to_blocks[request_id], self._layouts.get(request_id)
        if self.late.leave_before(request_id, known, num_tokens_main_model):
            return self.late.exchange(request_id, known, num_tokens, held)
        to_copy = self._copies.pop(request_id, [])
        copies = self.block_pool.get_new_blocks(len(to_copy)) if to_copy else []
        for index, block in zip(to_copy, copies, strict=True):
            self._apply_cow(request_id, index, held[index], block)
        stored = self.stored_tokens(request_id, num_tokens, num_tokens_main_model)
        return copies + super().allocate_new_blocks(request_id, stored, num_tokens_main_model)

    def tokens_that_fit(self, request_id: str, num_tokens: int) -> int:
        """Tokens of the request, from its start, that the blocks it holds have slots for.

        Args:
            num_tokens: as many are known to fit.
        """
        slots = len(self.req_to_blocks[request_id]) * self.block_size
        layout = self._layouts.get(request_id)
        if layout is not None and not layout.gone_by(num_tokens):
            return min(slots, layout.prompt_tokens)
        if layout is None or not self.findable.is_packed(layout):
            return slots
        evicted = layout.evicted(self.spec.first_layer)
        gone = 0 if evicted is None else evicted.total
        return slots + gone if num_tokens >= layout.spans.end else num_tokens

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._copies.pop(request_id, None)
        self._takes_over.discard(request_id)
        self.late.forget(request_id)
        self.findable.forget(request_id)
        return super().pop_blocks_for_free(request_id)
