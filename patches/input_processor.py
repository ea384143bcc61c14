"""Patch: ``InputProcessor.process_inputs`` also validates policies. See the ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap


def apply() -> None:
    """Validate ``flow_*`` keys in the front end, where a ValueError becomes HTTP 400.

    With the extension off, requests pass as in stock vLLM; the log says of the first with such keys that
    nobody reads them.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(
            self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            from vllm_flow.engine.front_end import incoming
            from vllm_flow.engine.settings import FlowSettings

            settings = FlowSettings.of(self.vllm_config)
            if settings is None:
                incoming.tell_unread(params)
                return original(self, request_id, prompt, params, *args, **kwargs)
            with incoming.refusals():
                incoming.check_keys(getattr(params, "extra_args", None), settings)
                request = original(self, request_id, prompt, params, *args, **kwargs)
                incoming.settle(request, settings)
            return request

        return process_inputs

    wrap(InputProcessor, "process_inputs", around)


def revert() -> None:
    """Put the original back."""
    from vllm.v1.engine.input_processor import InputProcessor

    unwrap(InputProcessor, "process_inputs")
