"""Tokens of a picture that see one another in both directions: where they are stored, and where a chunk may end.

A *mutual range* is a stretch of a prompt that holds image tokens only; a token in it sees all of it, and beyond
it what every token sees. Integers only; imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_flow.spans import ImageSpans, Range


def reached(ranges: Iterable[Range], first: int, end: int) -> tuple[Range, ...]:
    """The ranges that have a token in ``[first, end)``: in a step of these, no other one matters.

    What sees more than what is before it is a token of a range, and only while it is computed.
    """
    return tuple((start, stop) for start, stop in ranges if start < end and stop > first)


def stored(ranges: Iterable[Range], evicted: ImageSpans | None) -> tuple[Range, ...]:
    """Slots of what is left of each range in a layer; nothing of one of which fewer than two are left.

    The slot of a kept token is its rank among the kept ones, so slots keep the order of the tokens: those from
    the first kept one of a range to its last are the kept ones of the range, and no others.

    Args:
        evicted: what is gone in the layer, None before the first stage. Of a stage whose tokens the device
            chooses, one in which as many are gone of each range.
    """
    if evicted is None:
        return tuple(found for found in ranges if found[1] - found[0] > 1)
    slots = (
        (start - evicted.count_before(start), stop - evicted.count_before(stop))
        for start, stop in ranges
    )
    return tuple(found for found in slots if found[1] - found[0] > 1)


def shortened_chunk(ranges: Sequence[Range], num_computed: int, num_scheduled: int) -> int:
    """Tokens of a chunk from ``num_computed`` on, cut where it would divide what is left of a range.

    A token that is computed before the rest of its range would not see it. 0 where a range, or what a cached
    prefix has left of it, does not fit: it waits for a step with more room.
    """
    end = num_computed + num_scheduled
    for start, stop in ranges:
        if start < end < stop:
            return max(start - num_computed, 0)
    return num_scheduled
