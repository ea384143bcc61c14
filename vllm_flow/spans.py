"""Finds the image tokens of a prompt: half-open token ranges and the counts that follow.

Spans come from the prompt's placeholders, never from token ids: a sampled token whose id happens
to be the image token's is text. Knows nothing of policies, layers or vLLM.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
Range: TypeAlias = tuple[int, int]
"""Half-open: its first position, and the one past its last."""


@dataclass(frozen=True, slots=True, init=False, repr=False, eq=False)
class ImageSpans:
    """Sorted, disjoint, non-empty half-open ranges ``[start, end)`` of prompt positions.

    Held as arrays: a long video of which every other token leaves has thousands of them.
    """

    total: int
    """Number of image tokens in the prompt."""
    end: int
    """First position past the last image token (0 without images)."""
    _starts: IntArray
    _lengths: IntArray
    _before: IntArray
    _first: array[int]
    """The starts again: a look-up of one position is faster without numpy."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        bounds = np.array(tuple(ranges), dtype=np.int64).reshape(-1, 2)
        self._hold(bounds[:, 0].copy(), bounds[:, 1])

    def _hold(self, starts: IntArray, ends: IntArray) -> None:
        last = np.concatenate(([0], ends[:-1]))
        if not ((last <= starts) & (starts < ends)).all():
            ranges = tuple(zip(starts.tolist(), ends.tolist(), strict=True))
            raise ValueError(
                f"image spans must be sorted, disjoint and not empty, got {ranges}; "
                "build them with ImageSpans.from_ranges"
            )
        lengths = ends - starts
        # Asked for by every storage group of every request in every step.
        object.__setattr__(self, "total", int(lengths.sum()))
        object.__setattr__(self, "end", int(ends[-1]) if len(ends) else 0)
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_lengths", lengths)
        object.__setattr__(self, "_before", np.concatenate(([0], np.cumsum(lengths))))
        object.__setattr__(self, "_first", array("q", starts.tobytes()))

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The ranges as tuples, made anew each time."""
        ends = self._starts + self._lengths
        return tuple(zip(self._starts.tolist(), ends.tolist(), strict=True))

    @property
    def start(self) -> int:
        """Position of the first image token (0 without images)."""
        return self._first[0] if self._first else 0

    @property
    def nbytes(self) -> int:
        """How much memory they take, but for what any object does."""
        return 4 * self._starts.nbytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageSpans):
            return NotImplemented
        return np.array_equal(self._starts, other._starts) and np.array_equal(
            self._lengths, other._lengths
        )

    def __hash__(self) -> int:
        return hash((self._starts.tobytes(), self._lengths.tobytes()))

    def __repr__(self) -> str:
        return f"ImageSpans(ranges={self.ranges})"

    @classmethod
    def from_ranges(cls, ranges: Iterable[Range]) -> ImageSpans:
        """Spans from ranges in any order; touching and overlapping ones are merged, empty dropped."""
        merged: list[Range] = []
        for start, end in sorted(ranges):
            if end <= start:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        return cls(tuple(merged))

    @classmethod
    def from_positions(cls, positions: IntArray) -> ImageSpans:
        """Spans of these positions, which ascend and are different."""
        if not len(positions):
            return cls()
        cut = np.flatnonzero(np.diff(positions) != 1)
        spans = cls.__new__(cls)
        spans._hold(
            positions[np.concatenate(([0], cut + 1))], positions[np.concatenate((cut, [-1]))] + 1
        )
        return spans

    def count_before(self, position: int) -> int:
        """Number of image tokens at positions < ``position``."""
        if position >= self.end:
            return self.total
        index = bisect_left(self._first, position) - 1
        if index < 0:
            return 0
        inside = min(position - self._first[index], int(self._lengths[index]))
        return int(self._before[index]) + inside

    def counts_before(self, positions: ArrayLike) -> IntArray:
        """:meth:`count_before` for an array of positions, of any shape."""
        position = np.asarray(positions, dtype=np.int64)
        if not self.total:
            return np.zeros_like(position)
        index = np.searchsorted(self._starts, position, side="left")
        # Of the last span that starts before the position, or else of the first, what lies before it too.
        last = np.maximum(index - 1, 0)
        inside = np.clip(position - self._starts[last], 0, self._lengths[last])
        counts: IntArray = self._before[last] + inside
        return counts

    def kept_positions(self, ranks: ArrayLike) -> IntArray:
        """Position of the token with each rank among those that are no image, same shape."""
        rank = np.asarray(ranks, dtype=np.int64)
        # A span lies before a kept token if as many kept tokens as precede the span do.
        passed = np.searchsorted(self._starts - self._before[:-1], rank, side="right")
        positions: IntArray = rank + self._before[passed]
        return positions

    def is_image(self, positions: ArrayLike) -> NDArray[np.bool_]:
        """Whether each position holds an image token, same shape as ``positions``."""
        position = np.asarray(positions, dtype=np.int64)
        return self.counts_before(position + 1) > self.counts_before(position)
