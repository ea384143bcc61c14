"""Patch: ``OutputProcessor`` also reports and counts what was evicted. Ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap

METHODS = ("add_request", "process_outputs", "_update_stats_from_finished")


def apply(metrics: Any) -> None:
    """Tell ``metrics`` (the module ``vllm_flow.engine.front_end.metrics``) of requests as vLLM hears of them.

    Of a new one, of each step's outputs before they are processed, of a last output before the client
    gets it, and of a finished request where vLLM counts it.
    """
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    arounds = (_around_add, _around_process, _around_finished)
    for name, around in zip(METHODS, arounds, strict=True):
        wrap(OutputProcessor, name, partial(around, metrics))
    wrap(RequestState, "make_request_output", partial(_around_output, metrics))


def revert() -> None:
    """Put the originals back."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    for name in METHODS:
        unwrap(OutputProcessor, name)
    unwrap(RequestState, "make_request_output")


def _around_add(metrics: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        known = request.request_id in self.request_states
        result = original(self, request, *args, **kwargs)
        if not known:
            metrics.begin(self.request_states[request.request_id], request)
        return result

    return add_request


def _around_process(metrics: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        metrics.take_outlines(self.request_states, engine_core_outputs)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _around_output(metrics: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if finish_reason is not None:
            kv_transfer_params = metrics.finish(self, kv_transfer_params)
        return original(
            self,
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            kv_transfer_params,
            *args,
            **kwargs,
        )

    return make_request_output


def _around_finished(metrics: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_stats_from_finished(self: Any, req_state: Any, *args: Any, **kwargs: Any) -> Any:
        metrics.count(req_state)
        return original(self, req_state, *args, **kwargs)

    return _update_stats_from_finished
