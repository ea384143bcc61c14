"""What is known about a scene: its things with their boxes, and what its signs say. (pure)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_flow.demo_model.vocabulary import in_order

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are one past the last."""


@dataclass(frozen=True)
class Thing:
    """One object in a scene."""

    name: str
    box: Box
    """Around the pixels where it is to be seen."""

    @property
    def middle(self) -> float:
        """Horizontal middle in pixels."""
        return (self.box[0] + self.box[2]) / 2


@dataclass(frozen=True)
class Sign:
    """A plate with a word on it."""

    word: str
    box: Box


@dataclass(frozen=True)
class Facts:
    """Everything that questions about a scene may ask."""

    things: tuple[Thing, ...]
    signs: tuple[Sign, ...] = ()

    @property
    def counts(self) -> Mapping[str, int]:
        """Class name -> how many there are, in class order."""
        counts = Counter(thing.name for thing in self.things)
        return {name: counts[name] for name in in_order(counts)}

    @property
    def objects(self) -> tuple[str, ...]:
        """Distinct class names in class order."""
        return tuple(self.counts)

    def beside(self, least: float = 24.0) -> list[tuple[str, str]]:
        """Pairs (left, right) of single things whose middles are at least ``least`` pixels apart."""
        single = [thing for thing in self.things if self.counts[thing.name] == 1]
        return [
            (one.name, other.name)
            for one in single
            for other in single
            if one.middle + least <= other.middle
        ]

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON; ``from_json`` reads it."""
        return {
            "things": [[thing.name, *thing.box] for thing in self.things],
            "signs": [[sign.word, *sign.box] for sign in self.signs],
        }

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Facts:
        """The inverse of ``as_json``."""
        return Facts(
            tuple(Thing(name, (a, b, c, d)) for name, a, b, c, d in row["things"]),
            tuple(Sign(word, (a, b, c, d)) for word, a, b, c, d in row["signs"]),
        )
