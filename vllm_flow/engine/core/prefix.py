"""Prefix caching for requests that evict: found by the same policy, never by another.

Seams: ``KVCacheManager.get_computed_blocks`` for the look-up, ``free`` and ``pop_blocks_for_free`` for
the order of eviction, ``cache_salt`` for the separation.
vLLM puts the salt into a request's first block hash, and every later hash builds on it, so a salt
per policy gives each policy a hash chain of its own. How the longest prefix is found: `hits`.
Terms, with a drawing: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_flow.engine.core.connectors import comes_from_elsewhere
from vllm_flow.engine.core.freeing import by_position
from vllm_flow.engine.core.hits import Hit, lacks, longest_hit
from vllm_flow.engine.core.storage_groups import StorageGroups
from vllm_flow.layout import TokenLayout, of_prompt

SALT_MARK = "\x00vllm-flow"
"""Begins every policy's salt. Clients may not send it, or they could read a policy's blocks."""


def policy_salt(cache_salt: str | None, layout: TokenLayout) -> str:
    """The salt of a request that evicts; keeps apart what the client's own salt kept apart."""
    return f"{SALT_MARK}\x00{layout.salt}\x00{cache_salt or ''}"


class FlowKVCacheManager(KVCacheManager):
    """vLLM's manager, which looks prefixes of requests with a layout up by the layout."""

    flow_groups: StorageGroups

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int]:
        layout = self.flow_groups.layouts.get(request.request_id)
        if layout is None:
            # vLLM 0.32 knows no bound, and none is what it hands over.
            bound = () if max_cache_hit_length is None else (max_cache_hit_length,)
            return super().get_computed_blocks(request, *bound)
        # What comes from elsewhere has all of its blocks filled by a connector.
        if comes_from_elsewhere(request) or not self.prefix_cache_lookup_enabled(request):
            return self.empty_kv_cache_blocks, 0, 0
        if layout.late:
            return self._hit_in_prompt(request, layout, max_cache_hit_length)
        found = self._longest_hit(request, layout, max_cache_hit_length)
        self._take_over(request, False)
        if found.tokens and not self._fits(request, found.blocks, found.tokens):
            # Waiting might not help: with nobody else running, copies would be all that keeps the
            # request from a pool that has room for it.
            self._take_over(request, True)
        return self._hit(request, found.blocks, found.tokens, found.without_states)

    def get_computed_blocks_for_connector(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """The prefix that every group holds, states or not; vLLM would go by the first group alone.

        A connector brings a state and the tokens behind it, but no blocks that another storage group has lost.
        """
        return *self.get_computed_blocks(request, max_cache_hit_length), False

    def _hit_in_prompt(
        self, request: Request, layout: TokenLayout, max_tokens: int | None
    ) -> tuple[KVCacheBlocks, int, int]:
        """The hit of a request whose images leave after the prefill: what those without a policy find.

        Of its prompt alone: behind it, they have computed their answers with the image. And not all of
        it, so that a request that was preempted comes by the end of its prompt again.
        """
        # vLLM adds drafts, which are no part of a prompt, to a last token alone.
        last = max(layout.last_step_tokens, 2 if self.flow_groups.drafts else 1)
        longest = min(request.num_tokens - 1, layout.prompt_tokens - last)
        if max_tokens is not None:
            longest = min(longest, max_tokens)
        blocks, num_tokens, *_ = self.coordinator.find_longest_cache_hit(
            request.block_hashes, longest
        )
        return self._hit(request, blocks, num_tokens)

    def _hit(
        self,
        request: Request,
        blocks: tuple[Sequence[KVCacheBlock], ...],
        num_tokens: int,
        without_states: int = 0,
    ) -> tuple[KVCacheBlocks, int, int]:
        """What vLLM wants to know of a hit; told to listeners where the request asks for that.

        Args:
            without_states: tokens of the prefix that is shared but for its state, which vLLM then has made.
        """
        if getattr(request, "kv_cache_report_mode", None) == "full":
            self._report_hit(request, num_tokens)
        junction = without_states if without_states > num_tokens else 0
        return self.create_kv_cache_blocks(blocks), num_tokens, junction

    def _report_hit(self, request: Request, num_tokens: int) -> None:
        """Tell whoever listens to KV events of a hit's blocks of tokens, in every group."""
        for manager in self.flow_groups.every:
            # Does nothing where events are off, or for no tokens.
            self.block_pool.emit_cached_block_events(
                request,
                num_tokens // manager.block_size,
                manager.block_size,
                manager.kv_cache_group_id,
            )

    def _take_over(self, request: Request, wanted: bool) -> None:
        for manager in self.flow_groups.managers:
            manager.take_over(request.request_id, wanted)

    def _fits(self, request: Request, hit: tuple[list[KVCacheBlock], ...], num_tokens: int) -> bool:
        """Whether the pool has room for all of a request that is admitted on a hit.

        Asks as :meth:`allocate_slots` will; a request of which only a chunk must fit is asked too
        much, and takes blocks over that it could have copied.
        """
        needed = self.coordinator.get_num_blocks_to_allocate(
            request.request_id,
            num_tokens=min(request.num_tokens, self.max_model_len),
            new_computed_blocks=hit,
            num_encoder_tokens=0,
            total_computed_tokens=num_tokens,
            num_local_computed_tokens=num_tokens,
            num_tokens_main_model=request.num_tokens,
        )
        return needed + self.watermark_blocks <= self.block_pool.get_num_free_blocks()

    def estimate_cached_tokens(self, request: Request) -> int:
        """Prompt tokens of the request that another could find; asked with its first token."""
        groups, size = self.flow_groups, self.flow_groups.block_size
        layout = groups.layouts.get(request.request_id)
        if layout is not None and layout.late:
            # Its blocks may have been exchanged by now; what they held is found as before.
            whole = request.num_prompt_tokens // size * size
            return whole if self.enable_caching else 0
        if layout is None and groups.states:
            return super().estimate_cached_tokens(request)
        if layout is None:  # whose blocks every storage group has named alike
            held = groups.managers[0].req_to_blocks[request.request_id]
            return max((block.block_hash_num_tokens or 0 for block in held), default=0)
        # Blocks of a layout are made findable a step late; those of the step that gave the token are
        # made so here. A later step is in flight where scheduling is asynchronous.
        self.cache_blocks(request, min(request.num_computed_tokens, request.num_prompt_tokens))
        blocks = (group.findable_blocks(request.request_id) for group in groups.findable)
        end = layout.last_end(min(blocks) * size, size)
        if groups.states:
            end = self._longest_hit(request, layout, end).tokens
        return end

    def has_prefix_in_flight(self, request: Request) -> bool:
        """Whether the next step would find a longer prefix of a new request than this one does.

        Stock vLLM lets requests of one step share what that step computes. Packed blocks cannot be
        shared so early, as the tail of a hit is copied before the forward pass.
        """
        in_flight, block_size = self.flow_groups.in_flight, self.flow_groups.block_size
        layout = of_prompt(self.flow_groups.layouts.get(request.request_id))
        if layout is None or not in_flight or request.num_computed_tokens:
            return False
        if comes_from_elsewhere(request) or not self.prefix_cache_lookup_enabled(request):
            return False
        limit = (request.num_tokens - 1) // block_size
        coming = next(
            (
                num_blocks
                for num_blocks in range(min(limit, len(request.block_hashes)), 0, -1)
                if layout.key(request.block_hashes[num_blocks - 1], num_blocks * block_size)
                in in_flight
            ),
            0,
        )
        tokens = layout.last_end(coming * block_size, block_size)
        if not tokens:
            return False
        # Mostly what is being computed is not there yet; many may wait for it, in every step.
        if lacks(request.block_hashes, tokens // block_size, layout, self.flow_groups.findable):
            return True
        return tokens > self._longest_hit(request, layout).tokens

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """The request's blocks in the order in which a prefix needs them, through all groups."""
        request_id, groups = request.request_id, self.flow_groups
        self.coordinator.forget(request_id)
        layout = groups.layouts.get(request_id)
        if not any(manager.packs(request_id) for manager in groups.managers):
            layout = None  # all is stored by position
        return by_position(
            [manager.pop_blocks_for_free(request_id) for manager in groups.managers],
            layout,
            [manager.spec.first_layer for manager in groups.managers],
            groups.block_size,
            [manager.pop_blocks_for_free(request_id) for manager in groups.states],
        )

    def free(self, request: Request) -> None:
        """Give the request's blocks back, those of its last tokens to be evicted first."""
        self.block_pool.free_blocks(reversed(self.pop_blocks_for_free(request)))

    def _longest_hit(
        self, request: Request, layout: TokenLayout, max_tokens: int | None = None
    ) -> Hit:
        if max_tokens is None:
            # The last token is computed anew for its logits, as in stock vLLM.
            max_tokens = request.num_tokens - 1
        groups = self.flow_groups
        return longest_hit(request.block_hashes, max_tokens, layout, groups.findable, groups.states)
