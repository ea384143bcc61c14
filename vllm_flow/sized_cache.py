"""Keeps what was made lately, as far as it fits: a cache bounded by bytes, not by how many values it holds.

Knows nothing of what it holds. For values whose sizes a client decides, where any number of them is either too many
of the large ones or too few of the small ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class SizedCache(Generic[Value]):
    """The values used last, together at most ``most_bytes`` large. For several threads at once.

    Args:
        size_of: how many bytes a key and its value take. A value that alone takes more than a quarter of the room
            is not kept: it would send many others away.
    """

    def __init__(self, most_bytes: int, size_of: Callable[[Any, Value], int]) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._size_of = size_of
        self._held: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not there; two threads may both make it."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found[0]
        value = make()
        size = self._size_of(key, value)
        if size > self.most_bytes // 4:
            return value
        with self._lock:
            if key not in self._held:
                self._held[key] = value, size
                self.held_bytes += size
            while self.held_bytes > self.most_bytes:
                _, (_, gone) = self._held.popitem(last=False)
                self.held_bytes -= gone
        return value

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
            self.held_bytes = 0
