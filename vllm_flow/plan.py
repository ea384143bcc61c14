"""Policy x spans x scheduled tokens -> rows kept, packed positions, block needs. Integers only.

The one place that decides what eviction means for a batch; imports neither torch nor vLLM.

Terms. A *row* is one token of the step's flattened batch. A request's *packed position* of a kept
token is its rank among the request's kept tokens: where its key and value live in the block table
once the image is gone. A *variant* is a range of layers in which the same rows are alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans, IntArray


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where one request's tokens are stored, per layer: its policy applied to its image spans."""

    spans: ImageSpans
    cliff: int

    @classmethod
    def of(cls, policy: FlowPolicy | None, spans: ImageSpans) -> TokenLayout | None:
        """The layout, or None where nothing is ever evicted (no policy, or no image)."""
        if policy is None or spans.total == 0:
            return None
        return cls(spans, policy.cliff)

    def evicts_at(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based) sees no image token."""
        return layer >= self.cliff

    def stored_tokens(self, num_tokens: int, first_layer: int) -> int:
        """Slots that the first ``num_tokens`` tokens need in a storage group.

        Args:
            num_tokens: tokens of the request, prompt and output, from the start.
            first_layer: shallowest layer of the storage group. One layer before the cliff makes
                the whole group hold the image, since its layers share one block table.
        """
        if not self.evicts_at(first_layer):
            return num_tokens
        return num_tokens - self.spans.count_before(num_tokens)

    def stored_positions(self, positions: IntArray, layer: int) -> IntArray:
        """Slot in ``layer`` of the first stored token at or after each position, same shape."""
        if not self.evicts_at(layer):
            return positions
        return positions - self.spans.counts_before(positions)


@dataclass(frozen=True, slots=True)
class PackedBoundary:
    """What a prefix of whole blocks means for a storage group that keeps packed tokens.

    Seen from the prefix one block shorter, at most one packed block became full on the way and at
    most one is partly filled at the end, since a block of tokens keeps at most a block of them.
    """

    full_blocks: int
    """Packed blocks that hold kept tokens of the prefix only, and all they can."""
    completed: int | None
    """The packed block that became full since the prefix one block shorter, or, if the prefix ends in
    an image, the full one that it ends behind."""
    tail: int | None
    """The packed block that the prefix fills in part; its later slots are anybody's."""


def packed_boundary(layout: TokenLayout, num_blocks: int, block_size: int) -> PackedBoundary:
    """The packed blocks that a prefix of ``num_blocks`` whole blocks of tokens ends in."""

    def kept(blocks: int) -> int:
        tokens = blocks * block_size
        return tokens - layout.spans.count_before(tokens)

    before, now = kept(num_blocks - 1), kept(num_blocks)
    full = now // block_size
    tail = full if now % block_size else None
    became_full = full > before // block_size
    return PackedBoundary(
        full_blocks=full,
        completed=full - 1 if became_full or (full and tail is None) else None,
        tail=tail,
    )


def blocks_taken(required: int, idle: Sequence[bool], shared: int, *, take_over: bool) -> int:
    """Free blocks that a request admitted on a prefix hit takes from the pool in one group.

    A block of the hit that nobody holds counts as free, so a hit never takes more than no hit
    would, unless blocks that the request will write are copied: then the copy comes on top.

    Args:
        required: blocks the request holds in the end; as many as the hit has, or more.
        idle: per block of the hit, whether nobody holds it.
        shared: blocks of the hit, from its start, that are never written again.
        take_over: write idle blocks in their place instead of in a copy.
    """
    written = list(idle[shared:])
    copies = written.count(False) if take_over else len(written)
    return max(required - len(idle), 0) + sum(idle) + copies


def storage_groups(num_layers: int, group_layers: int) -> tuple[int, ...]:
    """First layer of each storage group of ``group_layers`` consecutive layers.

    Raises:
        ValueError: ``group_layers`` does not divide ``num_layers``. vLLM pads unequal groups,
            which would waste the memory that eviction saves.
    """
    if group_layers < 1 or num_layers % group_layers:
        divisors = [str(d) for d in range(1, num_layers + 1) if num_layers % d == 0]
        raise ValueError(
            f"group_layers={group_layers} does not divide the model's {num_layers} decoder "
            f"layers; use one of {', '.join(divisors)}."
        )
    return tuple(range(0, num_layers, group_layers))


def default_group_layers(num_layers: int, max_groups: int = 8) -> int:
    """Smallest divisor of ``num_layers`` that makes at most ``max_groups`` storage groups.

    More groups save memory more finely, but each costs a block table and metadata per step.
    """
    divisors = (d for d in range(1, num_layers + 1) if num_layers % d == 0)
    return next(d for d in divisors if num_layers // d <= max_groups)


def predict_blocks(
    num_tokens: int,
    layout: TokenLayout | None,
    group_starts: Sequence[int],
    block_size: int,
) -> tuple[int, ...]:
    """KV blocks a request holds in each storage group once ``num_tokens`` tokens are computed."""
    stored = (
        num_tokens if layout is None else layout.stored_tokens(num_tokens, start)
        for start in group_starts
    )
    return tuple(-(-tokens // block_size) for tokens in stored)


def row_count_ideal(*, num_layers: int, cliff: int, prompt_tokens: int, image_tokens: int) -> float:
    """Prefill speed-up if time were proportional to rows x layers.

    Rows of all layers without eviction over rows of all layers with it; the vision tower, the
    output head and the quadratic part of attention are not counted.
    """
    full = num_layers * prompt_tokens
    return full / (full - (num_layers - cliff) * image_tokens)


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step: tokens ``[num_computed, num_computed + num_scheduled)``."""

    num_computed: int
    num_scheduled: int
    layout: TokenLayout | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """Rows and positions for the layers from ``first_layer`` up to the next variant's.

    R rows of Q requests are alive. A request whose scheduled tokens are all evicted has no row
    and is left out of ``requests``; with R = 0 the layers have nothing to do at all.
    """

    first_layer: int
    rows: IntArray | None
    """[R] indices into the step's rows, ascending; None where every row is alive."""
    gather: IntArray | None
    """[R] indices into the rows of the variant before; None where nothing is dropped here."""
    row_requests: IntArray
    """[R] batch index of each row's request."""
    positions: IntArray
    """[R] position of each row in its request's storage: packed where the request evicts."""
    requests: IntArray
    """[Q] batch indices of the requests with at least one row, ascending."""
    query_start_loc: IntArray
    """[Q + 1] first row of each request, then R."""
    seq_lens: IntArray
    """[Q] stored tokens of each request after the step."""

    @property
    def num_rows(self) -> int:
        return len(self.row_requests)

    @property
    def max_query_len(self) -> int:
        starts = self.query_start_loc
        return int((starts[1:] - starts[:-1]).max(initial=0))

    @property
    def max_seq_len(self) -> int:
        return int(self.seq_lens.max(initial=0))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step's layers past the first cliff do; the layers before it run as in stock vLLM."""

    num_rows: int
    variants: tuple[Variant, ...]
    """By ascending ``first_layer``; never empty."""

    def variant_at(self, layer: int) -> Variant | None:
        """The variant of a layer, None before the first cliff."""
        current = None
        for variant in self.variants:
            if variant.first_layer <= layer:
                current = variant
        return current


def plan_step(requests: Sequence[ScheduledRequest]) -> StepPlan | None:
    """Plan one step for a batch in which requests may have different policies or none.

    Args:
        requests: the batch in row order; every request has at least one scheduled token.

    Returns:
        The plan, or None where no request evicts anything: the step is then stock vLLM's.
    """
    cliffs = sorted({r.layout.cliff for r in requests if r.layout is not None})
    if not cliffs:
        return None
    if all(
        r.num_scheduled == 1 and (r.layout is None or r.num_computed >= r.layout.spans.end)
        for r in requests
    ):
        return _plan_decode(requests, cliffs)
    computed = np.array([r.num_computed for r in requests], dtype=np.int64)
    scheduled = np.array([r.num_scheduled for r in requests], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(scheduled)))
    num_rows = int(starts[-1])
    request_of_row = np.repeat(np.arange(len(requests), dtype=np.int64), scheduled)
    position = np.arange(num_rows, dtype=np.int64) + (computed - starts[:-1])[request_of_row]
    packed, image = position.copy(), np.zeros(num_rows, dtype=np.bool_)
    seq_len, evicted = computed + scheduled, np.zeros(len(requests), dtype=np.int64)
    cliff = np.full(len(requests), np.iinfo(np.int64).max)
    for index, request in enumerate(requests):
        if request.layout is None:
            continue
        spans, own = request.layout.spans, slice(starts[index], starts[index + 1])
        cliff[index] = request.layout.cliff
        if request.num_computed >= spans.end:  # decode, or prefill past the last image
            packed[own] -= spans.total
            evicted[index] = spans.total
        else:
            packed[own] -= spans.counts_before(position[own])
            image[own] = spans.is_image(position[own])
            evicted[index] = spans.count_before(int(seq_len[index]))
    variants: list[Variant] = []
    alive: NDArray[np.bool_] = np.ones(num_rows, dtype=np.bool_)
    for first_layer in cliffs:
        evicting = cliff <= first_layer
        evicting_row = evicting[request_of_row]
        keep = ~(evicting_row & image)
        rows = np.flatnonzero(keep)
        per_request = np.bincount(request_of_row[rows], minlength=len(requests))
        present = np.flatnonzero(per_request)
        variants.append(
            Variant(
                first_layer=first_layer,
                rows=None if len(rows) == num_rows else rows,
                gather=None if len(rows) == alive.sum() else np.flatnonzero(keep[alive]),
                row_requests=request_of_row[rows],
                positions=np.where(evicting_row, packed, position)[rows],
                requests=present,
                query_start_loc=np.concatenate(([0], np.cumsum(per_request[present]))),
                seq_lens=(seq_len - np.where(evicting, evicted, 0))[present],
            )
        )
        alive = keep
    return StepPlan(num_rows, tuple(variants))


def _plan_decode(requests: Sequence[ScheduledRequest], cliffs: Sequence[int]) -> StepPlan:
    """The plan of a step of one token per request, each past its images: no row leaves.

    Such steps are most of a server's, and short: what is general about :func:`plan_step` would cost
    more than a hundredth of one.
    """
    count = len(requests)
    layouts = [request.layout for request in requests]
    position = np.array([r.num_computed for r in requests], dtype=np.int64)
    missing = np.array([0 if t is None else t.spans.total for t in layouts], dtype=np.int64)
    never = cliffs[-1] + 1
    cliff = np.array([never if t is None else t.cliff for t in layouts], dtype=np.int64)
    index = np.arange(count + 1, dtype=np.int64)
    variants = []
    for first_layer in cliffs:
        stored = position - np.where(cliff <= first_layer, missing, 0)
        variants.append(
            Variant(
                first_layer=first_layer,
                rows=None,
                gather=None,
                row_requests=index[:-1],
                positions=stored,
                requests=index[:-1],
                query_start_loc=index,
                seq_lens=stored + 1,
            )
        )
    return StepPlan(count, tuple(variants))
