"""How many consecutive decoder layers share a block table. Integers only.

A *storage group* is what vLLM calls a KV-cache group. Terms, with a drawing: docs/glossary.md. In a model of which
some layers *attend* (store keys and values), and the others keep a state per request, storage groups are of the
former; vLLM makes groups of the same size of the latter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

FEW_GROUPS = 4
"""With fewer groups memory is saved so coarsely that a little padding is the better choice."""
MAX_PADDING = 0.05
"""Of the layers: what blocks of a smaller last group may leave empty."""
GROUPS_WITH_A_DRAFTER = 12
"""The most storage groups by default where a drafter's layer comes before a model's, whose number then has other
divisors: 33 layers are 11 groups of 3, or 3 of 11."""
GROUPS_BESIDE_STATES = 5
"""The most storage groups by default where others keep states, of which there are several groups for each."""


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


def storage_groups(num_layers: int, group_layers: int, draft_layers: int = 0) -> tuple[int, ...]:
    """First layer of each storage group of ``group_layers`` consecutive ones; the last may have fewer.

    Args:
        draft_layers: layers of a drafter, which come before the model's, numbered from ``-draft_layers`` on. All
            of them are in the first group.

    Raises:
        ValueError: the last group would be so small that vLLM would split the others, or the first one has no room
            for a drafter's layers.
    """
    total = num_layers + draft_layers
    sizes = [size for size in group_sizes(total) if size >= draft_layers]
    if group_layers not in sizes:
        drafter, room = "", ""
        if draft_layers:
            drafter, room = (
                f", {draft_layers} of its drafter before them,",
                ", or the drafter no room",
            )
        raise ValueError(
            f"group_layers={group_layers} leaves the last of the model's {num_layers} decoder layers{drafter} "
            f"a group of no more than two thirds of it, or none at all{room}; use one of "
            f"{', '.join(map(str, sizes))}."
        )
    return tuple(range(-draft_layers, num_layers, group_layers))


def default_group_layers(num_layers: int, draft_layers: int = 0, max_groups: int = 8) -> int:
    """Layers per storage group, so that there are at most ``max_groups``, or ``GROUPS_WITH_A_DRAFTER``.

    More groups save memory more finely, but each costs a block table and metadata per step. Equal
    groups waste nothing: the smallest divisor, where it makes ``FEW_GROUPS`` or more. Else (34, 46, 62,
    94 layers) the last group may be smaller, if what its blocks leave empty is ``MAX_PADDING`` of a
    request without a policy or less; one that evicts loses least, as it stores least in deep layers.
    """
    if draft_layers:
        num_layers, max_groups = num_layers + draft_layers, GROUPS_WITH_A_DRAFTER
    sizes = [s for s in group_sizes(num_layers) if -(-num_layers // s) <= max_groups]
    sizes = [size for size in sizes if size >= draft_layers]
    equal = next(size for size in sizes if num_layers % size == 0)
    if num_layers // equal >= FEW_GROUPS:
        return equal
    return next(size for size in sizes if -num_layers % size <= MAX_PADDING * num_layers)


def attending_groups(
    num_layers: int, group_layers: int, attending: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """First and last of the attending layers of each storage group, in a model where others keep states.

    Args:
        group_layers: consecutive decoder layers, of both kinds, whose attending ones are one group.
        attending: the layers that attend, ascending.

    Raises:
        ValueError: groups would have different numbers of layers, and vLLM would divide the larger ones.
    """
    sizes = attending_group_sizes(num_layers, attending)
    if group_layers not in sizes:
        raise ValueError(
            f"group_layers={group_layers} parts the {len(attending)} of the model's {num_layers} decoder "
            f"layers that have keys into groups of different sizes, or none; use one of "
            f"{', '.join(map(str, sizes))}."
        )
    members: dict[int, list[int]] = {}
    for layer in attending:
        members.setdefault(layer // group_layers, []).append(layer)
    return tuple((layers[0], layers[-1]) for layers in members.values())


def attending_group_sizes(num_layers: int, attending: Sequence[int]) -> tuple[int, ...]:
    """Layers that storage groups may span so that each has as many that attend."""
    return tuple(
        size
        for size in range(1, num_layers + 1)
        if len(set(Counter(layer // size for layer in attending).values())) == 1
    )


def default_attending_span(num_layers: int, attending: Sequence[int]) -> int:
    """Layers that a storage group spans, so that there are as many as may be up to ``GROUPS_BESIDE_STATES``."""

    def groups(size: int) -> int:
        return len(attending_groups(num_layers, size, attending))

    sizes = attending_group_sizes(num_layers, attending)
    few = [size for size in sizes if groups(size) <= GROUPS_BESIDE_STATES]
    return max(few, key=lambda size: (groups(size), num_layers % size == 0, size))


def grouped(
    num_layers: int, group_layers: int, attending: Sequence[int] = (), draft_layers: int = 0
) -> tuple[tuple[int, int], ...]:
    """First and last layer of each storage group, in a model of either kind.

    Args:
        attending: the layers that attend, where others keep states; empty where all do.
        draft_layers: see :func:`storage_groups`.

    Raises:
        ValueError: see :func:`storage_groups` and :func:`attending_groups`.
    """
    if attending:
        return attending_groups(num_layers, group_layers, attending)
    starts = storage_groups(num_layers, group_layers, draft_layers)
    return tuple((first, end - 1) for first, end in pairwise((*starts, num_layers)))


def default_span(num_layers: int, attending: Sequence[int] = (), draft_layers: int = 0) -> int:
    """Layers per storage group where nobody said, in a model of either kind; arguments as of :func:`grouped`."""
    if attending:
        return default_attending_span(num_layers, attending)
    return default_group_layers(num_layers, draft_layers)
