"""Kinds of keys in the prefix cache: offsets to the group id that vLLM appends to a block's hash.

A prefix names by position the block of its last tokens (as in stock vLLM); for each stage of the group's
layers, as completed the packed block it made full, as tail the packed block it fills in part. A key
promises what the block holds for whoever has the prefix, whichever request wrote it.
"""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from vllm_flow.layout_stages import LayoutStage

KINDS_APART = 1 << 16
"""Kinds of keys are this far apart as group ids; what is left over is the storage group."""

POSITION = 0
"""The kind of key of a block that holds tokens by position."""


def completed(stage: LayoutStage) -> int:
    """The kind of key of a packed block that a prefix made full."""
    return (2 * stage.layer + 1) * KINDS_APART


def tail(stage: LayoutStage) -> int:
    """The kind of key of a packed block that a prefix fills in part."""
    return (2 * stage.layer + 2) * KINDS_APART


def name(
    pool: BlockPool, block: KVCacheBlock, prefix: BlockHash, kind: int, group: int, num_tokens: int
) -> None:
    """Make a group's block findable by a prefix of ``num_tokens`` tokens.

    The pool keeps any number of keys per block and drops them with the block.
    """
    key = make_block_hash_with_group_id(prefix, kind + group)
    pool._insert_block_hash(key, block, num_tokens=num_tokens)


def find(pool: BlockPool, prefix: BlockHash, kind: int, group: int) -> KVCacheBlock | None:
    """The block of a group that a prefix names, None where it is gone."""
    found = pool.get_cached_block(prefix, [kind + group])
    return found[0] if found else None
