"""The hooks through which observers watch the scheduler work, in the order in which they are called.

An observer changes nothing that is scheduled, allocated or computed; it takes notes, and may add to what
a response reports. One concern per file: `footprints`, `report_observer`, `attention/answers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request


class Observer:
    """Sees a request's life. Every hook does nothing until a subclass gives it something to do.

    Of one request the hooks come in the order in which they stand here; of one step, ``step_ended``
    before and ``step_told`` after the requests that end with it.
    """

    def added(self, request: Request) -> None:
        """It has arrived; nothing is allocated yet."""

    def step_ended(self, model_runner_output: Any) -> None:
        """A step was computed; its tokens are not part of any answer yet."""

    def freeing(self, request: Request) -> None:
        """It has ended; its blocks and its layout are still there."""

    def finished(self, request: Request) -> dict[str, Any]:
        """It has ended, and its blocks are given back, or a connector's to give back.

        Returns:
            What its response reports, under :data:`vllm_flow.engine.report.REPORT_KEY`.
        """
        return {}

    def step_told(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """The step's tokens are part of the answers; ``outputs`` are about to be sent."""

    def closed(self) -> None:
        """The engine shuts down."""
