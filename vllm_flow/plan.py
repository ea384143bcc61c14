"""What a step does: layouts and scheduled tokens become rows kept and packed positions. Integers only.

The one place that decides what eviction means for a batch; imports neither torch nor vLLM.

Terms. A *row* is one token of the step's flattened batch. A *variant* is a range of layers in which
the same rows are alive. Packed positions: see `layout`. With a drawing: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_flow.layout import TokenLayout
from vllm_flow.spans import IntArray


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
    batch = _Batch.of(requests)
    return StepPlan(batch.num_rows, tuple(_variants(batch, cliffs)))


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step's rows and requests, before any row has left: R rows of N requests."""

    request_of_row: IntArray
    """[R] batch index."""
    position: IntArray
    """[R] position in the request."""
    packed: IntArray
    """[R] position among the tokens that the request keeps past its cliff."""
    image: NDArray[np.bool_]
    """[R] whether the row leaves at its request's cliff."""
    cliff: IntArray
    """[N] first layer without image rows; never reached where nothing is evicted."""
    seq_len: IntArray
    """[N] tokens after the step."""
    evicted: IntArray
    """[N] tokens among them that are evicted past the cliff."""

    @property
    def num_rows(self) -> int:
        return len(self.request_of_row)

    @classmethod
    def of(cls, requests: Sequence[ScheduledRequest]) -> _Batch:
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
        return cls(request_of_row, position, packed, image, cliff, seq_len, evicted)


def _variants(batch: _Batch, cliffs: Sequence[int]) -> Iterator[Variant]:
    """The batch from each cliff on; at each, the image rows of the requests that reach it leave."""
    alive: NDArray[np.bool_] = np.ones(batch.num_rows, dtype=np.bool_)
    for first_layer in cliffs:
        evicting = batch.cliff <= first_layer
        evicting_row = evicting[batch.request_of_row]
        keep = ~(evicting_row & batch.image)
        rows = np.flatnonzero(keep)
        per_request = np.bincount(batch.request_of_row[rows], minlength=len(batch.seq_len))
        present = np.flatnonzero(per_request)
        yield Variant(
            first_layer=first_layer,
            rows=None if len(rows) == batch.num_rows else rows,
            gather=None if len(rows) == alive.sum() else np.flatnonzero(keep[alive]),
            row_requests=batch.request_of_row[rows],
            positions=np.where(evicting_row, batch.packed, batch.position)[rows],
            requests=present,
            query_start_loc=np.concatenate(([0], np.cumsum(per_request[present]))),
            seq_lens=(batch.seq_len - np.where(evicting, batch.evicted, 0))[present],
        )
        alive = keep


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
