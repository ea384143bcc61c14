"""`vllm-flow eval` on Ray as it is, with engines that open the pictures and answer yes.

    python -m tests.eval.fake_engine ARGUMENTS...

For what happens to batches, processes and disks: without vLLM an engine is there in a second. What real ones answer is
test_engine_actor.py's.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import datetime, timezone
from functools import partial
from typing import Any

import pyarrow as pa

from vllm_flow import cli
from vllm_flow.eval.sweep import driver, engine_args, machines
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.pictures import picture_key, read_pictures, unreadable
from vllm_flow.eval.sweep.schema import answers_table

SECONDS = 0.05
"""Per question, so that a run can be met at work; `--engine-args '{"seconds": 1}'` for others."""


class FakeActor:
    """Answers yes under every policy; a picture that cannot be read is an error row, as with real engines."""

    def __init__(self, options: EngineOptions) -> None:
        self.background = options.background
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.turn = threading.Lock()
        self.seconds = options.engine_args.get("seconds", SECONDS)

    def __call__(self, work: pa.Table) -> pa.Table:
        """A batch's answers; of those that are given out together, one after the other."""
        with self.turn:
            return self._answers(work.to_pylist())

    def _answers(self, items: list[dict[str, Any]]) -> pa.Table:
        pictures = read_pictures(items, self.background)
        rows: list[dict[str, Any]] = []
        for item in items:
            time.sleep(self.seconds)
            picture = pictures.get(picture_key(item))
            said: dict[str, Any] = {"answer": "Yes"}
            if isinstance(picture, Exception):
                said = {"error": unreadable(item, picture)}
            key = {"task": item["task"], "item_id": item["item_id"], "engine": self.name}
            now = datetime.now(timezone.utc)
            rows += [{**key, **said, "policy": p, "written_at": now} for p in item["policies"]]
        return answers_table(rows)


def any_name() -> None:
    """In the place of `engine_args.known_names`: these engines have arguments that vLLM has not."""


fake_answers = partial(driver.answers, actor=FakeActor)  # type: ignore[arg-type]


def main(argv: list[str], answers: Any = fake_answers) -> int:
    """The command's exit status."""
    driver.answers = answers
    engine_args.known_names = any_name
    machines.PATIENCE = float(os.environ.get("VLLM_FLOW_TEST_PATIENCE", machines.PATIENCE))
    return cli.main(argv)


if __name__ == "__main__":
    from tests.eval import fake_engine  # so that Ray's workers know its classes by name
    from vllm_flow.exits import leave

    leave(fake_engine.main(sys.argv[1:]))
