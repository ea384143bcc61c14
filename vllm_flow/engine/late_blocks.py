"""Blocks of images that leave after the prefill: a prompt's are exchanged before its answer goes on.

Seam: vLLM's ``FullAttentionManager``, whose other half of ours is `storage`. Which blocks stay, and how
many others it takes: `rewriting`. Who copies what stays: `moving`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_flow.engine.groups import GroupSpec
from vllm_flow.layout import TokenLayout
from vllm_flow.rewriting import Need, Rewrite, is_rewritten, need


class LateBlocks(FullAttentionManager):
    """What a storage group's manager does for requests whose images leave after the prefill.

    Until then they are requests without a policy: their blocks are found and shared by position.
    """

    _layouts: Mapping[str, TokenLayout] = {}
    _rewritten: set[str]
    """Requests whose images have left this group after the prefill."""
    _rewrites: dict[str, Rewrite]
    """Those of the step being scheduled."""

    @property
    def spec(self) -> GroupSpec:
        return self.kv_cache_spec

    def _layout(self, request_id: str) -> TokenLayout | None:
        """By which the request's blocks are filled and found; None where that is by position."""
        layout = self._layouts.get(request_id)
        return None if layout is not None and layout.late else layout

    def packs(self, request_id: str) -> bool:
        """Whether the request has a layout that has had effect on its blocks."""
        layout = self._layouts.get(request_id)
        return layout is not None and (not layout.late or request_id in self._rewritten)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Not by position once the blocks hold something else: beside some drafters vLLM 0.33 knows the hash of a
        prompt's last block only with tokens behind it, when its images have left."""
        if request.request_id not in self._rewritten:
            super().cache_blocks(request, *args, **kwargs)

    def take_rewrites(self) -> dict[str, Rewrite]:
        """Whose blocks were exchanged since the last call, and how; to be copied before the step."""
        found, self._rewrites = self._rewrites, {}
        return found

    def _to_rewrite(self, request_id: str, num_tokens: int) -> TokenLayout | None:
        """The layout of a request whose images leave this group before it holds ``num_tokens`` tokens."""
        layout = self._layouts.get(request_id)
        if layout is None or request_id in self._rewritten or num_tokens <= layout.prompt_tokens:
            return None
        return layout if is_rewritten(layout, self.spec.last_layer) else None

    def _need(self, request_id: str, layout: TokenLayout, num_tokens: int) -> Need:
        spec, held = self.spec, self.req_to_blocks[request_id]
        uses = [block.ref_cnt for block in held]
        return need(layout, spec.first_layer, spec.last_layer, num_tokens, self.block_size, uses)

    def _rewrite(self, request_id: str, layout: TokenLayout, num_tokens: int) -> list[KVCacheBlock]:
        """Exchange the blocks of a computed prompt, from the first token that leaves on.

        What others hold or may find stays what it is. Blocks are given back before others are taken:
        the worker reads all of a step's rows before it writes any.
        """
        held, needed = self.req_to_blocks[request_id], self._need(request_id, layout, num_tokens)
        # One more where a drafter had to have room behind the prompt.
        assert len(held) >= -(-layout.prompt_tokens // self.block_size), (
            "a step computes either tokens of the prompt or those behind it"
        )
        old = held[needed.kept :]
        self.block_pool.free_blocks(reversed(old))
        held[needed.kept :] = new = self.block_pool.get_new_blocks(needed.new)
        self._rewritten.add(request_id)
        self._rewrites[request_id] = Rewrite(
            needed.kept, tuple(b.block_id for b in old), tuple(b.block_id for b in new)
        )
        return list(new)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._rewritten.discard(request_id)
        self._rewrites.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
