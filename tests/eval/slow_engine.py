"""`vllm-flow eval` with its real engines, which answer one batch at a time and wait before each.

    python -m tests.eval.slow_engine ARGUMENTS...

So that a run can be met at work, however fast the machine is.
"""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from typing import Any

import pyarrow as pa

from tests.eval import fake_engine
from vllm_flow.eval.sweep import driver
from vllm_flow.eval.sweep.engine_actor import EngineActor

SECONDS = 3.0
"""Per batch."""


class SlowActor(EngineActor):
    """A real engine that is not asked all at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.turn = threading.Lock()

    def __call__(self, work: pa.Table) -> pa.Table:
        with self.turn:
            time.sleep(SECONDS)
            return super().__call__(work)


slow_answers = partial(driver.answers, actor=SlowActor)


def main(argv: list[str]) -> int:
    """The command's exit status."""
    return fake_engine.main(argv, slow_answers)


if __name__ == "__main__":
    from tests.eval import slow_engine  # so that Ray's workers know its classes by name
    from vllm_flow.exits import leave

    leave(slow_engine.main(sys.argv[1:]))
