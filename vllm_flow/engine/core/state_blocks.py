"""Caches the states of prompts that evict: names each block of states by its prefix and policy.

A state sums up a whole prefix, so a prefix-cache hit needs a single block of the group. A block can be named only
where a step ended exactly at the end of a prefix, since only then does it hold that prefix's state. The hashes that
name prefixes contain the policy, as those of packed blocks do: past a cliff a state has taken in fewer rows.

Seam: vLLM's ``MambaManager``, one per KV-cache group of states, in its mode "align". Where states lie, when they are
copied and when their blocks go back is vLLM's. Of a request without a policy everything is.
"""

from __future__ import annotations

from collections.abc import Collection

from vllm.v1.core.kv_cache_coordinator import replay_boundaries
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request

from vllm_flow.engine.core import cache_keys
from vllm_flow.engine.core.cache_keys import POSITION
from vllm_flow.engine.core.events import announce
from vllm_flow.engine.core.prefix_keys import Prefixes


class FlowStateManager(MambaManager):
    """vLLM's manager of states, that finds them by a layout's prefixes, too; see `coordination`."""

    def retains(self, request: Request, num_blocks: int, retention_interval: int | None) -> bool:
        """Whether the state of ``num_blocks`` whole blocks of a request's tokens is to be found, where there is one.

        Args:
            retention_interval: the operator's ``prefix_cache_retention_interval``; by default vLLM keeps those of
                which a further request is known to go on: beside some drafters it goes on a block earlier.
        """
        goes_on = replay_boundaries(
            request.num_prompt_tokens, self.block_size, self.drop_eagle_checkpoint_block
        )
        kept = self.reachable_block_mask(
            num_blocks - 1,
            num_blocks,
            self.cache_hit_alignment_tokens,
            self.kv_cache_spec,
            self.use_eagle,
            retention_interval,
            (*goes_on, request.shared_prefix_boundary),
        )
        return kept is None or kept[0]

    def tokens_that_fit(self, request_id: str) -> int:
        """Tokens of a request, from its start, behind which it has blocks for its state; those of drafts come last."""
        held = len(self.req_to_blocks[request_id]) - self.num_speculative_blocks
        return held * self.block_size

    def cache_prefixes(
        self, request: Request, prefixes: Prefixes, retained: Collection[int]
    ) -> None:
        """Make states of a request with a layout findable, of which some may be already.

        Args:
            prefixes: all of them computed by steps before the one being scheduled.
            retained: whole blocks of tokens with whose end a step ended, and whose states are to be found.
        """
        held, group = self.req_to_blocks[request.request_id], self.kv_cache_group_id
        for num_blocks, key, may_end in prefixes.named:
            if not may_end or num_blocks not in retained or held[num_blocks - 1].is_null:
                continue
            block, num_tokens = held[num_blocks - 1], num_blocks * self.block_size
            cache_keys.insert(self.block_pool, block, [key], POSITION, group, num_tokens)
            announce(self.block_pool, request, num_blocks - 1, num_blocks, group)

    def find_state(self, key: BlockHash) -> KVCacheBlock | None:
        """The state of a prefix, None where it is gone; blocks before it a hit has none of here."""
        return cache_keys.find(self.block_pool, key, POSITION, self.kv_cache_group_id)
