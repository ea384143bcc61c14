"""The last layer that sees an image: of rows whose output nobody reads, it needs keys and values only.

A row that leaves at layer c is read by others in layer c - 1 and reads nobody for anybody: its query,
attention, output projection and MLP there are work for nothing. :func:`spare_last_layers` turns a
step's plan into one in which such rows leave one layer earlier, but for their keys and values.
Integers only; imports neither torch nor vLLM.

A causal kernel takes a request's rows to be its last tokens. In layer c - 1 text stands before, between
and after images whose rows are no longer there, so a request's rows are given in *runs*: stretches whose
storage positions follow one another, each of which the kernel takes for a request of its own over the
same blocks, as long as its last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from vllm_flow.spans import IntArray
from vllm_flow.step import ScheduledRequest, StepPlan, Variant


@dataclass(frozen=True, slots=True)
class LastKeys:
    """D rows whose keys and values a layer still reads, and whose output nobody does."""

    rows: IntArray
    """[D] indices into the step's rows, ascending."""
    gather: IntArray
    """[D] indices into the rows of the variant before."""
    row_requests: IntArray
    """[D] batch index of each row's request."""
    positions: IntArray
    """[D] position of each row in its request's storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastLayer(Variant):
    """A variant of one layer: R rows in Q runs, and rows of which only keys and values are stored.

    Of the fields that a :class:`Variant` has per request, ``requests`` holds the batch index of each
    run's request, ascending; ``query_start_loc`` the first row of each run, then R; ``seq_lens`` the
    stored tokens up to each run's end. With R = 0 the layer stores the last keys and does nothing else.
    """

    last: LastKeys

    def taken_up(self, layer: int) -> LastLayer:
        last = replace(self.last, gather=self.last.rows)
        return replace(self, first_layer=layer, gather=self.rows, last=last)


def spare_last_layers(plan: StepPlan, requests: Sequence[ScheduledRequest]) -> StepPlan:
    """The plan in which rows leave one layer before their cliff, all but their keys and values.

    Rows that leave before layer 0 have no such layer, and of rows that are chosen on the device, or leave
    after such a choice, the host cannot say which they are: these leave where the plan says.

    Args:
        plan: made of these requests by :func:`vllm_flow.plan.plan_step`.
        requests: the batch in row order.
    """
    known = tuple(takewhile(_decided, plan.variants))
    leaving = {v.first_layer: v for v in known if v.gather is not None and v.first_layer}
    if not leaving:
        return plan
    every_row = np.arange(plan.num_rows, dtype=np.int64)
    starts = {v.first_layer for v in plan.variants} | {layer - 1 for layer in leaving}
    before, variants = every_row, list[Variant]()
    for layer in sorted(starts):
        now = plan.variant_at(layer)
        if layer + 1 in leaving:
            stock = _stock_rows(requests) if now is None else (now.row_requests, now.positions)
            rows = every_row if now is None or now.rows is None else now.rows
            variants.append(_last_layer(layer, before, rows, stock, leaving[layer + 1].rows))
        else:
            assert now is not None, "a layer is in the list for a variant or for the one after it"
            # Behind a last layer the rows have left already.
            left = bool(variants) and isinstance(variants[-1], LastLayer)
            variants.append(replace(now, gather=None) if left else now)
        alive = variants[-1].rows
        before = every_row if alive is None else alive
    return replace(plan, variants=tuple(variants))


def _decided(variant: Variant) -> bool:
    """Whether the host knows which rows are alive: no rank on the device chooses them."""
    return not variant.rankings


def _last_layer(
    layer: int,
    before: IntArray,
    rows: IntArray,
    stored: tuple[IntArray, IntArray],
    staying: IntArray | None,
) -> LastLayer:
    """The layer whose rows are ``rows``, of which only ``staying`` go on.

    Args:
        before: rows that come out of the layer before.
        stored: (batch index, position in storage) of each of ``rows`` in this layer.
    """
    assert staying is not None, "where all rows are alive none has left"
    row_requests, positions = stored
    stays = np.zeros(int(rows[-1]) + 1, dtype=np.bool_)
    stays[staying] = True
    keep = stays[rows]
    owners, places = row_requests[keep], positions[keep]
    edges = _runs(owners, places)
    return LastLayer(
        first_layer=layer,
        rows=staying,
        gather=np.searchsorted(before, staying),
        row_requests=owners,
        positions=places,
        requests=owners[edges[:-1]],
        query_start_loc=edges,
        seq_lens=places[edges[1:] - 1] + 1,
        last=LastKeys(
            rows=rows[~keep],
            gather=np.searchsorted(before, rows[~keep]),
            row_requests=row_requests[~keep],
            positions=positions[~keep],
        ),
    )


def _runs(owners: IntArray, places: IntArray) -> IntArray:
    """First row of each run, then the number of rows; [0] for no rows."""
    if not len(owners):
        return np.zeros(1, dtype=np.int64)
    ends = np.flatnonzero((np.diff(places) != 1) | (np.diff(owners) != 0)) + 1
    return np.concatenate(([0], ends, [len(owners)]))


def _stock_rows(requests: Sequence[ScheduledRequest]) -> tuple[IntArray, IntArray]:
    """(batch index, position) of every row in the layers before the first cliff."""
    scheduled = np.array([r.num_scheduled for r in requests], dtype=np.int64)
    first = np.array([r.num_computed for r in requests], dtype=np.int64)
    owners = np.repeat(np.arange(len(requests), dtype=np.int64), scheduled)
    starts = np.concatenate(([0], np.cumsum(scheduled)))
    return owners, np.arange(starts[-1], dtype=np.int64) + (first - starts[:-1])[owners]
