"""Asks once per request what vLLM's coordinator asks every storage group, where all groups would give one answer.

In every step, for every request, vLLM's coordinator asks each KV-cache group three things: does the next token need a
new block, has a block become full, is a block no longer needed? In most steps the answer is no, for all groups alike,
and it is found here without asking each of them. Prefix-cache keys do not depend on the group either.

Seam: ``get_num_blocks_to_allocate``, ``allocate_new_blocks``, ``cache_blocks`` and ``remove_skipped_blocks`` of
vLLM's ``KVCacheCoordinator``, of whichever kind. What a group does of its own: `storage`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_flow.engine import adoption
from vllm_flow.engine.core.prefix_keys import Prefixes
from vllm_flow.engine.core.storage_groups import StorageGroups


class FlowCoordinator(KVCacheCoordinator):
    """Mixed in before the coordinator that vLLM has chosen; see :func:`coordinate`."""

    flow_groups: StorageGroups
    flow_room: dict[str, int]
    """Tokens of a request, from its start, for which it has slots in every group."""
    flow_cached: dict[str, int]
    """Of a request: whole blocks of *tokens* whose prefixes every group has been told of."""
    flow_retained: dict[str, set[int]]
    """Of a request with a layout, where there are states: whole blocks of tokens with whose end a step ended, and
    whose states vLLM keeps."""

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        if num_tokens <= self.flow_room.get(request_id, 0):
            return 0
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    def allocate_new_blocks(
        self,
        request_id: str,
        num_tokens: int,
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[KVCacheBlock], ...]:
        if num_tokens <= self.flow_room.get(request_id, 0):
            return tuple([] for _ in self.single_type_managers)
        known = num_tokens_main_model
        blocks = super().allocate_new_blocks(request_id, num_tokens, known, *args, **kwargs)
        rooms = [m.tokens_that_fit(request_id, known) for m in self.flow_groups.managers]
        rooms += [m.tokens_that_fit(request_id) for m in self.flow_groups.states]
        self.flow_room[request_id] = min(rooms)
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        if not self.block_pool.enable_caching:
            return
        request_id, size = request.request_id, self.scheduler_block_size
        layout = self.flow_groups.layouts.get(request_id)
        retained = self._retained(request, num_computed_tokens) if layout is not None else ()
        tokens = num_computed_tokens if layout is None else layout.findable(num_computed_tokens)
        # vLLM 0.33: beside some drafters a block has a hash once the tokens behind it are known.
        whole = min(tokens // size, len(request.block_hashes))
        if whole <= self.flow_cached.get(request_id, 0):
            return  # most steps complete no block
        if layout is None or layout.late:
            super().cache_blocks(request, min(tokens, (whole + 1) * size - 1))
            self.flow_cached[request_id] = whole
            return
        # A copy runs before its step's forward pass: what is found must have been computed by
        # an earlier step, not by the one being scheduled.
        computed = min(whole, request.num_computed_tokens // size)
        coming = Prefixes(request.block_hashes, layout, size, computed, whole)
        self.flow_groups.in_flight.update(
            key for n, key, _ in coming.named if n in retained or not self.flow_groups.states
        )
        known = min(group.findable_blocks(request_id) for group in self.flow_groups.findable)
        told = self.block_pool.enable_kv_cache_events
        prefixes = Prefixes(request.block_hashes, layout, size, known, computed, barred=told)
        for manager in self.flow_groups.managers:
            manager.cache_prefixes(request, prefixes)
        for of_states in self.flow_groups.states:
            of_states.cache_prefixes(request, prefixes, retained)
        self.flow_cached[request_id] = computed

    def _retained(self, request: Request, num_tokens: int) -> Collection[int]:
        """Where a request has states to be found, once the step being scheduled ends at ``num_tokens``."""
        if not self.flow_groups.states:
            return ()
        retained = self.flow_retained.setdefault(request.request_id, set())
        num_blocks, rest = divmod(num_tokens, self.scheduler_block_size)
        if not rest and self.flow_groups.states[0].retains(
            request, num_blocks, self.retention_interval
        ):
            retained.add(num_blocks)
        return retained

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Of states alone: the attention of a storage group skips no token, see `groups`."""
        for manager in self.flow_groups.states:
            manager.remove_skipped_blocks(*args, **kwargs)

    def unname(self, request: Request) -> None:
        """Have blocks of a preempted request forgotten that nothing is computed in.

        vLLM names a block as soon as it schedules the tokens that fill it, and may preempt a request by another one of
        the same step. vLLM 0.32 and 0.33 leave such a block its name, and whoever finds it reads what was there before.
        """
        first = request.num_computed_tokens // self.scheduler_block_size
        named = {
            block.block_id
            for manager in self.flow_groups.every
            for block in manager.req_to_blocks.get(request.request_id, ())[first:]
            if block.block_hash is not None
        }
        self.block_pool.evict_blocks(named)

    def forget(self, request_id: str) -> None:
        """The request gives its blocks back."""
        for of_request in (self.flow_room, self.flow_cached, self.flow_retained):
            of_request.pop(request_id, None)


def coordinate(coordinator: KVCacheCoordinator, groups: StorageGroups) -> None:
    """Let a scheduler's coordinator ask its storage groups once per request."""
    adoption.adopt(
        coordinator,
        FlowCoordinator,
        flow_groups=groups,
        flow_room={},
        flow_cached={},
        flow_retained={},
    )
