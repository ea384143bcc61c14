"""Hands the attention of a token to the log once the token is part of an answer.

A step may come too late: after a stop, an abort or a preemption its tokens are thrown away. And a
preempted request computes rows again whose tokens it has long had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm import envs
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from vllm_flow.attention import TokenAttention
from vllm_flow.engine.core.attention.writer import AttentionLogWriter
from vllm_flow.engine.core.observers import Observer
from vllm_flow.engine.report import log_report
from vllm_flow.engine.requests import requested_log
from vllm_flow.engine.wire import attention_of


class LoggedAnswers(Observer):
    """Logs the requests that ask for it.

    Args:
        log: where rows go.
        requests: those in the engine, by id.
    """

    def __init__(
        self, log: AttentionLogWriter, requests: Mapping[str, Request], num_layers: int
    ) -> None:
        self.log = log
        self.rows: dict[str, int] = {}
        """Rows handed over, of the requests in the engine that log."""
        self._requests = requests
        self._num_layers = num_layers
        self._layers: dict[str, int] = {}
        self._pending: dict[str, tuple[Request, TokenAttention]] = {}
        """Of the step being processed: what may become part of an answer."""

    def layers_of(self, request_id: str) -> int:
        """How many layers of a request are logged; 0 where it does not log."""
        return self._layers.get(request_id, 0)

    def added(self, request: Request) -> None:
        asked = requested_log(request, self._num_layers)
        if asked:
            self.rows[request.request_id] = 0
            self._layers[request.request_id] = len(asked.layers)

    def step_ended(self, model_runner_output: Any) -> None:
        self._pending = {
            request_id: (request, found)
            for request_id, found in attention_of(model_runner_output).items()
            if (request := self._requests.get(request_id)) is not None
            and found.token == request.num_output_tokens
        }

    def finished(self, request: Request) -> dict[str, Any]:
        request_id = request.request_id
        if request_id not in self.rows:
            return {}
        self._settle(request_id)  # the last token, before it is reported
        self._layers.pop(request_id)
        # An aborted request's report reaches nobody; what was dropped waits for the next one.
        aborted = request.status is RequestStatus.FINISHED_ABORTED
        dropped = 0 if aborted else self.log.take_dropped()
        return dict(log_report(self.rows.pop(request_id), dropped))

    def step_told(self, outputs: Iterable[EngineCoreOutput]) -> None:
        for request_id in list(self._pending):
            self._settle(request_id)

    def closed(self) -> None:
        self.log.close()

    def _settle(self, request_id: str) -> None:
        """Log a request's token of this step if it became part of the answer."""
        request, found = self._pending.pop(request_id, (None, None))
        if request is None or found is None or request.num_output_tokens <= found.token:
            return
        if self.log.add(client_request_id(request_id), found):
            self.rows[request_id] += found.num_rows


def client_request_id(request_id: str) -> str:
    """The id that the client knows, from the engine's: vLLM appends a dash and eight characters.

    The n-th of several answers to one request keeps the ``n_`` that vLLM puts in front.
    """
    return request_id if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else request_id[:-9]
