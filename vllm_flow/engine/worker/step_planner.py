"""A worker's plans of its steps: who takes part in one, and the layouts of those that evict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_flow.decode_plan import decode_facts
from vllm_flow.engine.layout_book import LayoutBook
from vllm_flow.handing_on import NOTHING, Handing, handing
from vllm_flow.last_layer import spare_last_layers
from vllm_flow.plan import plan_step
from vllm_flow.rewriting import LateReading, late_readings
from vllm_flow.step import ScheduledRequest, StepPlan, StepShares, scheduled_request


class WorkersStep(NamedTuple):
    """What of a step is one worker's."""

    plan: StepPlan | None
    """Of its layers; None where no request evicts anything in them."""
    late: Sequence[LateReading]
    """What it must read; see :func:`vllm_flow.rewriting.late_readings`."""
    handing: Handing = NOTHING
    """What it is told and tells, of a pipeline's stages."""


class StepPlanner:
    """Plans steps by what a book knows of their requests.

    Args:
        book: of the worker.
        spares_last_layers: whether the decoder can store a layer's keys and values alone; see ``last_layer.py``.
        layers: that the worker runs, of a pipeline some.
        most_runs: see :func:`vllm_flow.engine.worker.passes.last_layer.most_runs`.
    """

    def __init__(
        self,
        book: LayoutBook,
        *,
        spares_last_layers: bool,
        layers: range,
        most_runs: int | None = None,
    ) -> None:
        self._book, self._layers = book, layers
        self.spares_last_layers, self._most_runs = spares_last_layers, most_runs

    def plan(self, shares: StepShares) -> WorkersStep:
        """What of a step is the worker's; see :class:`WorkersStep`."""
        requests = self._scheduled(shares)
        plan = None if requests is None else plan_step(requests)
        if plan is not None and requests is not None:
            plan = self._spared(plan, requests)
        late, layers = self._late_readings(plan, shares), self._layers
        return WorkersStep(
            None if plan is None else plan.of_layers(layers),
            [reading for reading in late if reading.layer in layers],
            handing(plan, late, shares.request_ids, layers, self._book.num_layers),
        )

    def _spared(self, plan: StepPlan, requests: list[ScheduledRequest]) -> StepPlan:
        """The plan whose last layers compute no more than they must, where the decoder and its attention can."""
        if not self.spares_last_layers:
            return plan
        spared, most = spare_last_layers(plan, requests), self._most_runs
        if most is None or all(len(variant.requests) <= most for variant in spared.variants):
            return spared
        return plan  # a step of so many pieces of text has few rows to spare

    def _late_readings(self, plan: StepPlan | None, shares: StepShares) -> list[LateReading]:
        layouts = [self._book.layouts.get(request_id) for request_id in shares.request_ids]
        if not any(layout is not None and layout.read_layers for layout in layouts):
            return []
        computed, scheduled = map(int, shares.num_computed), map(int, shares.num_scheduled)
        return list(late_readings(plan, zip(computed, scheduled, layouts, strict=True)))

    def decode_facts(self, shares: StepShares) -> NDArray[np.int32] | None:
        """Of a step that was captured, :func:`vllm_flow.decode_plan.decode_facts`.

        None where no request evicts anything.
        """
        requests = self._scheduled(shares)
        return None if requests is None else decode_facts(requests, self._book.num_layers)

    def _scheduled(self, shares: StepShares) -> list[ScheduledRequest] | None:
        """The step's requests with their layouts; None where no request evicts anything."""
        book = self._book
        if not any(request_id in book.layouts for request_id in shares.request_ids):
            return None
        return [
            scheduled_request(
                int(computed),
                int(scheduled),
                book.layouts.get(request_id),
                book.mutual.get(request_id, ()),
            )
            for request_id, computed, scheduled in zip(*shares, strict=True)
        ]
