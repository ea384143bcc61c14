"""Keeps what the front end decided of a request, and its keys no longer say, till its answer is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_flow.engine.obstacles import Misfit

_FIELD = "flow_settled"
"""On a request's ``SamplingParams``, in the front end alone: vLLM sends their fields on, and this is none."""


@dataclass(frozen=True)
class Settled:
    """Of one request."""

    task: str = ""
    """That it named; one of the operator's profile."""
    skipped: Misfit | None = None
    """Why the operator's policy is not applied to it; None where it is, or there is none."""


def note(params: Any, settled: Settled) -> None:
    """Keep it with the request's parameters."""
    setattr(params, _FIELD, settled)


def noted(params: Any) -> Settled:
    """What was noted; nothing of a request that came another way."""
    found: Settled = getattr(params, _FIELD, Settled())
    return found
