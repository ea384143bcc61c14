"""How many consecutive decoder layers share a block table. Integers only.

A *storage group* is what vLLM calls a KV-cache group. Terms, with a drawing: docs/glossary.md. In a model of which
some layers *attend* (store keys and values), and the others keep a state per request, storage groups are of the
former; vLLM makes groups of the same size of the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vllm_flow.counts import counted

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
            f"group_layers={group_layers} leaves the last of the model's {counted(num_layers, 'decoder layer')}"
            f"{drafter} a group of no more than two thirds of it, or none at all{room}; use one of "
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
    num_layers: int, group_layers: int, attending: Sequence[int], draft_layers: int = 0
) -> tuple[tuple[int, int], ...]:
    """First and last of the attending layers of each storage group, in a model where others keep states.

    Args:
        group_layers: consecutive decoder layers, of both kinds, whose attending ones are one group.
        attending: the layers that attend, ascending.
        draft_layers: layers of a drafter, see :func:`storage_groups`; all of them attend. To be counted, each stands
            for as many layers as the model has up to its first that does. Where groups are equal without a drafter
            alone, its one layer comes to those of the first group, which vLLM then divides: that group is there twice.

    Raises:
        ValueError: groups would have different numbers of layers, and vLLM would divide the larger ones; or the first
            one has no room for a drafter's layers.
    """
    sizes = attending_group_sizes(num_layers, attending, draft_layers)
    found = (
        _attending_groups(group_layers, attending, draft_layers) if group_layers in sizes else None
    )
    if found is not None:
        return found
    drafter = f", with {draft_layers} of its drafter before them," if draft_layers else ""
    raise ValueError(
        f"group_layers={group_layers} parts the {len(attending)} of the model's {num_layers} decoder "
        f"layers that have keys{drafter} into groups of different sizes, or none; use one of "
        f"{', '.join(map(str, sizes))}."
    )


def _attending_groups(
    size: int, attending: Sequence[int], draft_layers: int
) -> tuple[tuple[int, int], ...] | None:
    """:func:`attending_groups`; None where it refuses."""
    equal = _equal_groups(size, attending, draft_layers)
    if equal is not None or draft_layers != 1:
        return equal
    alone = _equal_groups(size, attending, 0)
    if alone is None or len(alone) == 1:
        return None
    (_, last), *others = alone
    return (-1, last), (-1, last), *others


def _equal_groups(
    size: int, attending: Sequence[int], draft_layers: int
) -> tuple[tuple[int, int], ...] | None:
    """Groups of as many layers that attend each, the first with all of a drafter; None where they are not."""
    stride = attending[0] + 1
    counted = [((at + 1) * stride - 1, at - draft_layers) for at in range(draft_layers)]
    counted += [(layer + draft_layers * stride, layer) for layer in attending]
    members: dict[int, list[int]] = {}
    for at, layer in counted:
        members.setdefault(at // size, []).append(layer)
    groups = list(members.values())
    if len(set(map(len, groups))) > 1 or len(groups[0]) < draft_layers:
        return None
    return tuple((layers[0], layers[-1]) for layers in groups)


def attending_group_sizes(
    num_layers: int, attending: Sequence[int], draft_layers: int = 0
) -> tuple[int, ...]:
    """Layers that storage groups may span, see :func:`attending_groups`."""
    total = num_layers + draft_layers * (attending[0] + 1)
    return tuple(
        size
        for size in range(1, total + 1)
        if _attending_groups(size, attending, draft_layers) is not None
    )


def default_attending_span(num_layers: int, attending: Sequence[int], draft_layers: int = 0) -> int:
    """Layers that a storage group spans, so that there are as many as may be up to ``GROUPS_BESIDE_STATES``.

    Equal groups of the drafter's layers, too, where these are three or more; else those that there are without a
    drafter, of which vLLM divides the first one.
    """
    total = num_layers + draft_layers * (attending[0] + 1)
    groups = {
        size: len(found)
        for size in range(1, total + 1)
        if (found := _equal_groups(size, attending, draft_layers)) is not None
    }
    few = [size for size, count in groups.items() if count <= GROUPS_BESIDE_STATES]
    equal = max(few, key=lambda size: (groups[size], total % size == 0, size))
    if draft_layers != 1 or groups[equal] >= 3:
        return equal
    alone = default_attending_span(num_layers, attending)
    return alone if _attending_groups(alone, attending, draft_layers) else equal


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
        return attending_groups(num_layers, group_layers, attending, draft_layers)
    starts = storage_groups(num_layers, group_layers, draft_layers)
    return tuple((first, end - 1) for first, end in pairwise((*starts, num_layers)))


def default_span(num_layers: int, attending: Sequence[int] = (), draft_layers: int = 0) -> int:
    """Layers per storage group where nobody said, in a model of either kind; arguments as of :func:`grouped`."""
    if attending:
        return default_attending_span(num_layers, attending, draft_layers)
    return default_group_layers(num_layers, draft_layers)
