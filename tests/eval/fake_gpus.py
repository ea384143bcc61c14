"""Ray with four GPUs that are none, and engines of two workers each that say which ones they were given.

    python -m tests.eval.fake_gpus

prints what the pool is, and for every answer the devices that its engine sees. Without vLLM.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from vllm_flow.eval.sweep import connection, driver
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.schema import answers_table
from vllm_flow.eval.sweep.work import TaskWork, batches_of, plan_work
from vllm_flow.eval.tasks import Item

STARTED = "FAKE_GPUS_STARTED"
"""Environment variable: a folder with a file for every engine that has started."""
ENGINES, SECONDS = 2, 120


class Seer:
    """Answers with the devices that it sees, once every engine has started: none answers everything before."""

    def __init__(self, options: EngineOptions) -> None:
        self.sees = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        self._started = Path(os.environ[STARTED])
        (self._started / str(os.getpid())).touch()

    def __call__(self, work: pa.Table) -> pa.Table:
        end = time.monotonic() + SECONDS
        while len(list(self._started.iterdir())) < ENGINES and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.5)
        rows: list[dict[str, Any]] = [
            {
                "task": row["task"],
                "item_id": row["item_id"],
                "policy": "baseline",
                "answer": self.sees,
            }
            for row in work.to_pylist()
        ]
        return answers_table(rows)


def main() -> None:
    """Ask eight questions of as many engines as there is room for."""
    import ray

    os.environ[STARTED] = tempfile.mkdtemp()
    ray.init(address="local", num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False)
    pool = connection.connect(None, None, workers=2)
    print(f"pool {pool.engines} {pool.num_gpus}", flush=True)
    policies = parse_policies("baseline", 6)
    options = EngineOptions("m", "float32", 1, 16, "llava-1.5", policies)
    work = TaskWork("t", [Item(str(n), "?", None, {}) for n in range(8)], 1, "plain")
    batches = batches_of(plan_work([work], policies, set()), 1)
    for table in driver.answers(batches, options, pool, Seer):  # type: ignore[arg-type]
        print("sees", *table["answer"].to_pylist(), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    from tests.eval import fake_gpus  # so that Ray's workers know its classes by name

    fake_gpus.main()
