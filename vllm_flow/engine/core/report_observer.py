"""The scheduler's observer that sends reports: each goes with the response of a request that ends in the engine.

Where the front end ends a request itself (a stop string), the engine's last word never reaches the
client; so a request's first output carries what the front end needs to say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request

from vllm_flow.block_counts import Geometry
from vllm_flow.engine.core.footprints import Footprint
from vllm_flow.engine.core.observers import Observer
from vllm_flow.engine.report import REPORT_KEY, outline, report
from vllm_flow.layout import TokenLayout


class Reports(Observer):
    """Reports on requests that evict.

    Args:
        layouts: of the requests in the engine.
        footprints: of those that have ended.
        logged_layers: how many layers of a request are logged, by its id.
    """

    def __init__(
        self,
        geometry: Geometry,
        layouts: Mapping[str, TokenLayout],
        footprints: Mapping[str, Footprint],
        logged_layers: Callable[[str], int],
    ) -> None:
        self.geometry = geometry
        self._layouts = layouts
        self._footprints = footprints
        self._logged_layers = logged_layers
        self._evicted: set[str] = set()
        """Requests whose layout is gone and whose report is still to come."""

    def freeing(self, request: Request) -> None:
        if request.request_id in self._layouts:
            self._evicted.add(request.request_id)

    def finished(self, request: Request) -> dict[str, Any]:
        if request.request_id not in self._evicted:
            return {}
        self._evicted.remove(request.request_id)
        return dict(report(self._footprints[request.request_id], self.geometry))

    def step_told(self, outputs: Iterable[EngineCoreOutput]) -> None:
        for output in outputs:
            if output.prefill_stats is None or output.finish_reason is not None:
                continue  # not the first output, or one that brings the report itself
            layout = self._layouts.get(output.request_id)
            logged = self._logged_layers(output.request_id)
            if layout is not None or logged:
                found = outline(self.geometry, layout, logged)
                output.kv_transfer_params = {
                    **(output.kv_transfer_params or {}),
                    REPORT_KEY: found,
                }
