"""Blocks of images that leave after the prefill: a prompt's are exchanged before its answer goes on.

Knows one storage group and its pool. Which blocks stay, and how many others it takes: `rewriting`. Who copies
what stays: `moving`.
"""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_flow.engine.groups import GroupSpec
from vllm_flow.layout import TokenLayout
from vllm_flow.rewriting import Need, Rewrite, is_rewritten, need


class LateBlocks:
    """Of one storage group: whose images have left after the prefill, and what that exchanged."""

    def __init__(self, spec: GroupSpec, pool: BlockPool, block_size: int) -> None:
        self._spec, self._pool, self._block_size = spec, pool, block_size
        self._left: set[str] = set()
        """Requests whose images have left this group after the prefill."""
        self._rewrites: dict[str, Rewrite] = {}
        """Those of the step being scheduled."""

    def have_left(self, request_id: str) -> bool:
        return request_id in self._left

    def take_rewrites(self) -> dict[str, Rewrite]:
        """Whose blocks were exchanged since the last call, and how; to be copied before the step."""
        found, self._rewrites = self._rewrites, {}
        return found

    def leave_before(self, request_id: str, layout: TokenLayout | None, num_tokens: int) -> bool:
        """Whether a request's images leave this group before it holds ``num_tokens`` tokens."""
        if layout is None or request_id in self._left or num_tokens <= layout.prompt_tokens:
            return False
        return is_rewritten(layout, self._spec.last_layer)

    def need(self, layout: TokenLayout, num_tokens: int, held: list[KVCacheBlock]) -> Need:
        spec, uses = self._spec, [block.ref_cnt for block in held]
        return need(layout, spec.first_layer, spec.last_layer, num_tokens, self._block_size, uses)

    def exchange(
        self, request_id: str, layout: TokenLayout, num_tokens: int, held: list[KVCacheBlock]
    ) -> list[KVCacheBlock]:
        """Exchange the blocks of a computed prompt, from the first token that leaves on.

        What others hold or may find stays what it is. Blocks are given back before others are taken:
        the worker reads all of a step's rows before it writes any.

        Args:
            held: the request's blocks; changed.
        """
        needed = self.need(layout, num_tokens, held)
        # One more where a drafter had to have room behind the prompt.
        assert len(held) >= -(-layout.prompt_tokens // self._block_size), (
            "a step computes either tokens of the prompt or those behind it"
        )
        old = held[needed.kept :]
        self._pool.free_blocks(reversed(old))
        held[needed.kept :] = new = self._pool.get_new_blocks(needed.new)
        self._left.add(request_id)
        self._rewrites[request_id] = Rewrite(
            needed.kept, tuple(b.block_id for b in old), tuple(b.block_id for b in new)
        )
        return list(new)

    def forget(self, request_id: str) -> None:
        self._left.discard(request_id)
        self._rewrites.pop(request_id, None)
