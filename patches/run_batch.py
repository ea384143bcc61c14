"""Patch: vLLM's batch runner also checks the keys of each line. See the ledger in README.md."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap

MODULE = "vllm.entrypoints.launchers.run_batch"
_REFUSAL = "flow_refusal"


def apply(
    check: Callable[[str], str | None], noting: Callable[[Any, Awaitable[Any]], Awaitable[Any]]
) -> None:
    """Answer each line of a batch with an error for which ``check(line)`` has a sentence.

    Of the others ``noting(request, handled)`` is awaited in the place of ``handled``, their handling.

    Does nothing in a process that is no batch runner, which has loaded its module by the time an
    engine is configured.
    """
    for module in _loaded():
        wrap(module.BatchRequestInput, "model_validate_json", _reading(check))
        wrap(module, "handle_endpoint_request", _handling(module, noting))


def revert() -> None:
    """Put the originals back."""
    for module in _loaded():
        unwrap(module.BatchRequestInput, "model_validate_json")
        unwrap(module, "handle_endpoint_request")


def _loaded() -> list[Any]:
    """The runner's module; under another name where it is run with ``python -m``."""
    main = sys.modules["__main__"]
    own = main if getattr(getattr(main, "__spec__", None), "name", None) == MODULE else None
    return [module for module in (sys.modules.get(MODULE), own) if module is not None]


def _reading(check: Callable[[str], str | None]) -> Callable[..., Any]:
    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def model_validate_json(json_data: str, *args: Any, **kwargs: Any) -> Any:
            request = original(json_data, *args, **kwargs)
            setattr(request, _REFUSAL, check(json_data))
            return request

        return model_validate_json

    return around


def _handling(
    module: Any, noting: Callable[[Any, Awaitable[Any]], Awaitable[Any]]
) -> Callable[..., Any]:
    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def handle_endpoint_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            refusal = getattr(request, _REFUSAL, None)
            if refusal is not None:
                return module.make_async_error_request_output(request, error_msg=refusal)
            handled = original(request, *args, **kwargs)
            return None if handled is None else noting(request, handled)

        return handle_endpoint_request

    return around
