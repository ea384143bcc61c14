"""Kinds of keys in the prefix cache: offsets to the group id that vLLM appends to a block's hash.

A prefix of whole blocks of tokens has several keys in a storage group. One names the block of its last tokens by
position, as in stock vLLM. For each stage in the group's layers there may be two more: "completed" names the packed
block that the prefix made full, and "tail" the packed block that it fills in part. A key says what the block holds for
every request with this prefix, whichever request wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)

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


def insert(
    pool: BlockPool,
    block: KVCacheBlock,
    prefixes: Sequence[BlockHash],
    kind: int,
    group: int,
    num_tokens: int,
) -> None:
    """Make a group's block findable by each of some prefixes, as vLLM's ``_insert_block_hash`` does by one.

    The pool keeps any number of keys per block and drops them with the block.

    Args:
        prefixes: at least one, no two alike; the first has ``num_tokens`` tokens.
    """
    suffix = _suffix(kind + group)
    keys = [BlockHashWithGroupId(prefix + suffix) for prefix in prefixes]
    named = pool.cached_block_hash_to_block._cache
    if not named.keys().isdisjoint(keys):
        for key in keys:
            pool._insert_block_hash(key, block, num_tokens=num_tokens)
        return
    named.update(dict.fromkeys(keys, block))
    if block.block_hash is None:
        block.set_block_hash(keys.pop(0), num_tokens=num_tokens)
    if keys:
        pool.cached_block_hashes_by_block.setdefault(block.block_id, set()).update(keys)


def insert_each(
    pool: BlockPool,
    blocks: Sequence[KVCacheBlock],
    prefixes: Sequence[BlockHash],
    num_tokens: Sequence[int],
    group: int,
) -> bool:
    """Make a group's blocks findable by position, each by one prefix, as vLLM's ``cache_full_blocks`` does.

    Returns:
        False, and nothing is done, where a block has a name already or is vLLM's null block, or where a prefix names
        another block.
    """
    suffix = _suffix(POSITION + group)
    keys = [BlockHashWithGroupId(prefix + suffix) for prefix in prefixes]
    named = pool.cached_block_hash_to_block._cache
    if any(block.block_hash is not None or block.is_null for block in blocks):
        return False
    if not named.keys().isdisjoint(keys):
        return False
    named.update(zip(keys, blocks, strict=True))
    for block, key, end in zip(blocks, keys, num_tokens, strict=True):
        block.set_block_hash(key, num_tokens=end)
    return True


def _suffix(group_id: int) -> bytes:
    """What vLLM's ``make_block_hash_with_group_id`` appends to a hash."""
    return make_block_hash_with_group_id(BlockHash(b""), group_id)


def find(pool: BlockPool, prefix: BlockHash, kind: int, group: int) -> KVCacheBlock | None:
    """The block of a group that a prefix names, None where it is gone."""
    found = pool.get_cached_block(prefix, [kind + group])
    return found[0] if found else None


def find_until_gone(
    pool: BlockPool, prefixes: Iterable[BlockHash], kind: int, group: int
) -> list[KVCacheBlock]:
    """:func:`find` of one prefix after the other, up to the first whose block is gone."""
    suffix, named = _suffix(kind + group), pool.cached_block_hash_to_block._cache
    blocks = []
    for prefix in prefixes:
        found = named.get(BlockHashWithGroupId(prefix + suffix))
        if found is None:
            break
        # Where several blocks hold the same, vLLM has them by their ids, and finds the first.
        blocks.append(next(iter(found.values())) if isinstance(found, dict) else found)
    return blocks
