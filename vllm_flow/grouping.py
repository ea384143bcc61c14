"""How many consecutive decoder layers share a block table. Integers only.

A *storage group* is what vLLM calls a KV-cache group. Terms, with a drawing: docs/glossary.md.
"""

from __future__ import annotations

FEW_GROUPS = 4
"""With fewer groups memory is saved so coarsely that a little padding is the better choice."""
MAX_PADDING = 0.05
"""Of the layers: what blocks of a smaller last group may leave empty."""


def group_sizes(num_layers: int) -> tuple[int, ...]:
    """Layers that storage groups of a model may have; the last group holds what is left.

    All groups draw on one pool, so a block is as large as the largest group's. vLLM takes a smaller
    group as it is where it has more than two thirds of the largest one's layers, and splits all groups
    else (vllm/v1/core/kv_cache_utils.py, ``_get_kv_cache_groups_uniform_page_size``).
    """
    return tuple(
        size
        for size in range(1, num_layers + 1)
        if not (rest := num_layers % size) or 2 * size < 3 * rest
    )


def storage_groups(num_layers: int, group_layers: int) -> tuple[int, ...]:
    """First layer of each storage group of ``group_layers`` consecutive layers; the last may have fewer.

    Raises:
        ValueError: the last group would be so small that vLLM would split the others.
    """
    sizes = group_sizes(num_layers)
    if group_layers not in sizes:
        raise ValueError(
            f"group_layers={group_layers} leaves the last of the model's {num_layers} decoder layers "
            "a group of no more than two thirds of it, or none at all; use one of "
            f"{', '.join(map(str, sizes))}."
        )
    return tuple(range(0, num_layers, group_layers))


def default_group_layers(num_layers: int, max_groups: int = 8) -> int:
    """Layers per storage group, so that there are at most ``max_groups``.

    More groups save memory more finely, but each costs a block table and metadata per step. Equal
    groups waste nothing: the smallest divisor, where it makes ``FEW_GROUPS`` or more. Else (34, 46, 62,
    94 layers) the last group may be smaller, if what its blocks leave empty is ``MAX_PADDING`` of a
    request without a policy or less; one that evicts loses least, as it stores least in deep layers.
    """
    sizes = [s for s in group_sizes(num_layers) if -(-num_layers // s) <= max_groups]
    equal = next(size for size in sizes if num_layers % size == 0)
    if num_layers // equal >= FEW_GROUPS:
        return equal
    return next(size for size in sizes if -num_layers % size <= MAX_PADDING * num_layers)
