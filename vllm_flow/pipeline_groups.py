"""Divides the layers of a pipeline's stages into storage groups, each with a share of every stage's. Integers only.

A block's id is one id for all workers, and costs each of them a page per layer that it has in the largest group,
whatever group the block is of. Groups of consecutive layers would lie on one stage each, and leave their ids' pages on
all the others empty: of two stages half of the memory. So group ``i`` has the ``i``-th slice of each stage's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Slices = tuple[tuple[range, ...], ...]
"""Per storage group, the decoder layers that it has of each stage."""


@dataclass(frozen=True)
class PipelineStages:
    """How many decoder layers each stage of a pipeline has, the shallowest first."""

    layers: tuple[int, ...]

    def slices(self, groups: int) -> Slices:
        """The storage groups; of one stage their numbers of layers differ by one at most, and so do their sums.

        Where a stage has too few layers for equal slices, the last groups have one less, and those of another stage
        that are short come before them.
        """
        return _slices(self.layers, groups)

    def group_layers(self, groups: int) -> int:
        """Layers that a block of so many groups has pages for, on all stages together."""
        return sum(-(-layers // groups) for layers in self.layers)

    def groups_of(self, group_layers: int) -> int | None:
        """How many groups have so many layers, of all stages together, those that lack one counted in.

        None where some would have no layer of some stage, or vLLM would split them.
        """
        groups = -(-sum(self.layers) // group_layers)
        if groups > min(self.layers) or self.group_layers(groups) != group_layers:
            return None
        sizes = [sum(map(len, slices)) for slices in self.slices(groups)]
        return groups if min(sizes) == max(sizes) or 2 * max(sizes) < 3 * min(sizes) else None

    def padding(self, groups: int) -> float:
        """What blocks leave empty, as a part of the largest stage's layers: on it, or on a smaller one whose blocks
        come to need more."""
        return max(-(-layers // groups) * groups for layers in self.layers) / max(self.layers) - 1


@lru_cache(maxsize=64)
def _slices(stages: Sequence[int], groups: int) -> Slices:
    first, short = 0, 0
    by_stage = []
    for layers in stages:
        most = -(-layers // groups)
        missing = most * groups - layers
        lacking = {(groups - 1 - at) % groups for at in range(short, short + missing)}
        short += missing
        own = []
        for group in range(groups):
            end = first + most - (group in lacking)
            own.append(range(first, end))
            first = end
        by_stage.append(own)
    return tuple(zip(*by_stage, strict=True))
