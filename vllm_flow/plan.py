"""Plans a step: layouts and scheduled tokens become rows kept and packed positions. Integers only.

The one place that decides what eviction means for a batch; imports neither torch nor vLLM.

Terms: see `step`; packed positions: see `layout`. With a drawing: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_flow.layout import TokenLayout
from vllm_flow.layout_stages import Choice
from vllm_flow.mutual import stored
from vllm_flow.spans import IntArray, Range
from vllm_flow.step import Ranking, ScheduledRequest, StepPlan, Variant


def plan_step(requests: Sequence[ScheduledRequest]) -> StepPlan | None:
    """Plan one step for a batch in which requests may have different policies or none.

    Args:
        requests: the batch in row order; every request has at least one scheduled token.

    Returns:
        The plan, or None where no request evicts anything: the step is then stock vLLM's.

    Raises:
        ValueError: tokens that a rank needs together are computed in parts, which the scheduler never
            does.
    """
    kinds = {r.layout.breaks for r in requests if r.layout is not None}  # few, of many requests
    breaks = sorted({layer for layers in kinds for layer in layers})
    if not breaks:
        return None
    depth = max(map(len, kinds))
    if all(
        r.num_scheduled == 1 and (r.layout is None or r.num_computed >= r.layout.spans.end)
        for r in requests
    ):
        return _plan_decode(requests, breaks, depth)
    batch = _Batch.of(requests)
    return StepPlan(batch.num_rows, tuple(_variants(batch, breaks, depth)), batch.seq_len)


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step's rows and requests, before any row has left: R rows of N requests."""

    requests: Sequence[ScheduledRequest]
    starts: IntArray
    """[N + 1] first row of each request, then R."""
    request_of_row: IntArray
    """[R] batch index."""
    position: IntArray
    """[R] position in the request."""
    seq_len: IntArray
    """[N] tokens after the step."""

    @property
    def num_rows(self) -> int:
        return len(self.request_of_row)

    @classmethod
    def of(cls, requests: Sequence[ScheduledRequest]) -> _Batch:
        computed = np.array([r.num_computed for r in requests], dtype=np.int64)
        scheduled = np.array([r.num_scheduled for r in requests], dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(scheduled)))
        request_of_row = np.repeat(np.arange(len(requests), dtype=np.int64), scheduled)
        position = np.arange(int(starts[-1]), dtype=np.int64)
        position += (computed - starts[:-1])[request_of_row]
        return cls(requests, starts, request_of_row, position, computed + scheduled)


def _variants(batch: _Batch, breaks: Sequence[int], depth: int) -> Iterator[Variant]:
    """The batch from each break on; at each, rows leave of the requests that reach a stage there.

    Args:
        depth: the most stages that a request has.
    """
    alive: NDArray[np.bool_] = np.ones(batch.num_rows, dtype=np.bool_)
    packed = batch.position.copy()
    """[R] position among the tokens that the request keeps by then."""
    evicted = np.zeros(len(batch.requests), dtype=np.int64)
    past, rows_past = _past_images(batch)
    totals = _totals([batch.requests[index].layout for index in past.tolist()], breaks, depth)
    others = _reaching(batch, np.setdiff1d(np.arange(len(batch.requests)), past))
    seeing = [index for index, request in enumerate(batch.requests) if request.mutual]
    for number, first_layer in enumerate(breaks):
        keep, chosen = alive.copy(), []
        evicted[past] = totals[number]
        packed[rows_past] = batch.position[rows_past] - evicted[batch.request_of_row[rows_past]]
        for index in others.get(first_layer, ()):
            request = batch.requests[index]
            layout = request.layout
            assert layout is not None
            stage = layout.stages[layout.stage_at(first_layer) - 1]
            own = slice(int(batch.starts[index]), int(batch.starts[index + 1]))
            position = batch.position[own]
            before = stage.evicted.counts_before(np.append(position, position[-1] + 1))
            chosen += [(index, choice) for choice in _made_now(request, stage.choices)]
            # Positions of a request follow each other, so a token that counts is evicted.
            keep[own] = before[1:] == before[:-1]
            packed[own] = position - before[:-1]
            evicted[index] = before[-1]
        rows = np.flatnonzero(keep)
        per_request = np.bincount(batch.request_of_row[rows])
        present = np.flatnonzero(per_request)
        yield Variant(
            first_layer=first_layer,
            rows=None if len(rows) == batch.num_rows else rows,
            gather=None if len(rows) == alive.sum() else np.flatnonzero(keep[alive]),
            row_requests=batch.request_of_row[rows],
            positions=packed[rows],
            requests=present,
            query_start_loc=np.concatenate(([0], np.cumsum(per_request[present]))),
            seq_lens=(batch.seq_len - evicted)[present],
            rankings=tuple(
                _ranking(batch, first_layer, index, choice, alive, keep) for index, choice in chosen
            ),
            mutual=_mutual(batch.requests, first_layer, present, seeing),
        )
        alive = keep


def _past_images(batch: _Batch) -> tuple[IntArray, IntArray]:
    """Requests with a layout whose rows all lie behind their images, in decode or prefill; and those rows.

    No row of theirs leaves, so of a stage only the number of tokens that are gone matters.
    """
    past = np.array(
        [r.layout is not None and r.num_computed >= r.layout.spans.end for r in batch.requests],
        dtype=np.bool_,
    )
    return np.flatnonzero(past), np.flatnonzero(past[batch.request_of_row])


def _reaching(batch: _Batch, among: IntArray) -> dict[int, list[int]]:
    """By layer the requests, of some, that reach a stage there."""
    found: dict[int, list[int]] = {}
    for index in among.tolist():
        layout = batch.requests[index].layout
        for layer in () if layout is None else layout.breaks:
            found.setdefault(layer, []).append(index)
    return found


def _mutual(
    requests: Sequence[ScheduledRequest], layer: int, present: IntArray, seeing: Sequence[int]
) -> dict[int, tuple[Range, ...]]:
    """:attr:`Variant.mutual` of the requests ``present`` in a layer.

    Args:
        seeing: requests with mutual ranges, present or not.
    """
    found: dict[int, tuple[Range, ...]] = {}
    if not seeing:
        return found
    for place, index in zip(np.searchsorted(present, seeing).tolist(), seeing, strict=True):
        if place < len(present) and present[place] == index:
            layout = requests[index].layout
            gone = None if layout is None else layout.evicted(layer)
            if left := stored(requests[index].mutual, gone):
                found[place] = left
    return found


def _made_now(request: ScheduledRequest, choices: Sequence[Choice]) -> Iterator[Choice]:
    """Those of a stage's choices whose rows are in the step.

    Raises:
        ValueError: only some of the rows are, and the choice has not been made.
    """
    layout = request.layout
    assert layout is not None
    first, end = request.num_computed, request.num_computed + request.num_scheduled
    for choice in choices:
        if choice.start >= end:
            continue
        if choice.start < first and layout.may_end_at(first):
            continue  # all that stays is stored; the rows of the step leave
        needed = layout.prompt_tokens if choice.by_prompt else choice.stop
        if choice.start < first or needed > end:
            raise ValueError(
                f"tokens {choice.start} to {needed} must be computed in one step to be ranked, but "
                f"the step has {first} to {end}"
            )
        yield choice


def _ranking(
    batch: _Batch,
    layer: int,
    index: int,
    choice: Choice,
    alive: NDArray[np.bool_],
    keep: NDArray[np.bool_],
) -> Ranking:
    """The integers of a choice, given the rows alive before and after its stage."""
    request = batch.requests[index]
    layout = request.layout
    assert layout is not None
    row_of_token_0 = int(batch.starts[index]) - request.num_computed
    first_row = row_of_token_0 + choice.start
    source = int(np.count_nonzero(alive[:first_row]))

    def slot(position: int) -> int:
        before = layout.evicted(layer - 1)
        return position - (0 if before is None else before.count_before(position))

    query, visible = source + choice.left - 1, slot(choice.start) + choice.left
    question = max(1, layout.prompt_tokens - layout.spans.end)
    if choice.by_prompt:
        last = row_of_token_0 + layout.prompt_tokens - 1
        query, visible = int(np.count_nonzero(alive[:last])), slot(layout.prompt_tokens)
    return Ranking(
        request=index,
        choice=choice,
        picture=layout.pictures[choice.image] if layout.pictures else "",
        first_row=first_row,
        source=source,
        target=int(np.count_nonzero(keep[:first_row])),
        query=query,
        first_key=slot(choice.start),
        visible=visible,
        question_row=row_of_token_0 + layout.prompt_tokens - question,
        question=question,
    )


def _plan_decode(
    requests: Sequence[ScheduledRequest], breaks: Sequence[int], depth: int
) -> StepPlan:
    """The plan of a step of one token per request, each past its images: no row leaves.

    Such steps are most of a server's, and short: what is general about :func:`plan_step` would cost
    more than a hundredth of one.

    Args:
        depth: the most stages that a request has.
    """
    count = len(requests)
    position = np.array([r.num_computed for r in requests], dtype=np.int64)
    index = np.arange(count + 1, dtype=np.int64)
    variants = []
    totals = _totals([request.layout for request in requests], breaks, depth)
    for first_layer, gone in zip(breaks, totals, strict=True):
        stored = position - gone
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
    return StepPlan(count, tuple(variants), position + 1)


def _totals(layouts: Sequence[TokenLayout | None], breaks: Sequence[int], depth: int) -> IntArray:
    """[B, N] tokens that are gone of each request from each break on, once its images are computed.

    Args:
        depth: at least as many stages as each has.
    """
    layers = np.array(breaks, dtype=np.int64)[:, None]
    if not layouts:
        return np.zeros((len(breaks), 0), dtype=np.int64)
    # Where a request has no further stage, one that evicts nothing stands.
    if depth == 1:  # cliffs, and what else has one stage
        first = np.array([0 if t is None else t.breaks[0] for t in layouts], dtype=np.int64)
        missing = np.array([0 if t is None else t.totals[0] for t in layouts], dtype=np.int64)
        gone: IntArray = np.where(first <= layers, missing, 0)
        return gone
    none = (0,) * depth  # [N, S]
    first = np.array([none if t is None else (t.breaks + none)[:depth] for t in layouts])
    missing = np.array([none if t is None else (t.totals + none)[:depth] for t in layouts])
    # A later stage has evicted at least as much.
    gone = np.where(first <= layers[:, None], missing, 0).max(axis=2)
    return gone
