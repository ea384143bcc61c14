"""Works out which rows of a prompt move, from their positions to packed ones, when images leave after the prefill.

A storage group past a stage then holds the prompt in other blocks: those wholly before the first token
that leaves stay, the rest is copied, row by row, into blocks of its own. Integers only; imports neither
torch nor vLLM. `engine/core/storage` allocates, `engine/worker/moving` copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.spans import IntArray
from vllm_flow.step import ScheduledRequest, StepPlan


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One request's blocks in one storage group, before its images left and after."""

    kept: int
    """Blocks at the start of both that are the same."""
    old: tuple[int, ...]
    """Ids of the blocks behind them, by position."""
    new: tuple[int, ...]
    """Ids of those that take their place."""


@dataclass(frozen=True, slots=True)
class Need:
    """Blocks that a rewrite takes from the pool."""

    kept: int
    """See :attr:`Rewrite.kept`."""
    new: int
    """Blocks written anew."""
    net: int
    """Free blocks that there must be, when what the request held alone is given back first."""


def is_rewritten(layout: TokenLayout, last_layer: int) -> bool:
    """Whether a storage group that ends with ``last_layer`` holds less after the prompt than in it."""
    if not layout.late:
        return False
    gone = layout.evicted(last_layer)
    return gone is not None and gone.total > 0


def need(
    layout: TokenLayout,
    first_layer: int,
    last_layer: int,
    num_tokens: int,
    block_size: int,
    uses: Sequence[int],
) -> Need:
    """What it takes to have room for ``num_tokens`` tokens, of which the prompt is computed.

    Args:
        first_layer, last_layer: of a storage group that is rewritten.
        uses: of each block that the request holds, how many requests hold it.
    """
    kept = _first_gone(layout, last_layer) // block_size
    new = -(-layout.stored_tokens(num_tokens, first_layer) // block_size) - kept
    returned = sum(count == 1 for count in uses[kept:])
    return Need(kept, new, max(new - returned, 0))


def _first_gone(layout: TokenLayout, layer: int) -> int:
    """No token before this one is gone in a layer, whatever a device has chosen."""
    gone = layout.evicted(layer)
    assert gone is not None and gone.total
    stages = layout.stages[: layout.stage_at(layer)]
    chosen = (choice.start for stage in stages for choice in stage.choices)
    return min([gone.start, *chosen])


def moved_positions(
    layout: TokenLayout, layer: int, rewrite: Rewrite, block_size: int
) -> tuple[IntArray, IntArray]:
    """[R] positions, and packed ones, of a layer's rows of the prompt that move.

    Where a device chose, the former are what :func:`choosing_plan` says of the layer, from the first
    of the latter on.
    """
    gone = layout.evicted(layer)
    first, missing = rewrite.kept * block_size, 0 if gone is None else gone.total
    targets = np.arange(first, layout.prompt_tokens - missing, dtype=np.int64)
    return targets if gone is None else gone.kept_positions(targets), targets


def choosing_plan(layout: TokenLayout) -> StepPlan | None:
    """What would leave when, were the whole prompt computed in one step in which images leave.

    Choices of a device are made by it once the prompt is computed, on the scores that were read while
    it was: rows of the plan are positions. None where all is known here.
    """
    if not layout.chooses:
        return None
    # What a plan says does not depend on when images leave, but on the requests that it is made for.
    return plan_step([ScheduledRequest(0, layout.prompt_tokens, layout)])


@dataclass(frozen=True, slots=True)
class LateReading:
    """A row of a step whose attention in one layer decides what stays of its prompt."""

    request: int
    """Batch index."""
    layer: int
    row: int
    """The prompt's last, among the rows that are alive in the layer."""
    visible: int
    """Tokens of the prompt: slots that the row sees."""


def late_readings(
    plan: StepPlan | None, requests: Iterable[tuple[int, int, TokenLayout | None]]
) -> Iterator[LateReading]:
    """What a step must read: of requests of which it computes the prompt's last token.

    Args:
        plan: the step's.
        requests: computed tokens, scheduled tokens and layout, in the order of the batch's rows.
    """
    end = 0
    for index, (computed, scheduled, layout) in enumerate(requests):
        end += scheduled
        if layout is None or computed + scheduled != layout.prompt_tokens:
            continue
        for layer in layout.read_layers:
            variant, row = None if plan is None else plan.variant_at(layer), end - 1
            if variant is not None and variant.rows is not None:
                # However a device chooses among an image's rows, as many of them come before this one.
                row = int(np.searchsorted(variant.rows, row))
            yield LateReading(index, layer, row, layout.prompt_tokens)


def overlap(rewrites: Iterable[Rewrite]) -> bool:
    """Whether a block that one of them reads is written by one of them.

    Blocks are given back before others are taken, so a full pool gives the same ones again.
    """
    found = tuple(rewrites)
    read = {block for rewrite in found for block in rewrite.old}
    return any(block in read for rewrite in found for block in rewrite.new)
