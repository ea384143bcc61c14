"""Batches through Ray, to actors that start at once: what stays together, and which words an engine's end gets."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import BaseModel, field_validator

from tests.engine.fixtures import prepare_process

prepare_process()
pytest.importorskip("ray")

from tests.eval.demo_pope import small_options  # noqa: E402
from vllm_flow.eval.sweep import driver  # noqa: E402
from vllm_flow.eval.sweep.driver import SweepError  # noqa: E402
from vllm_flow.eval.sweep.engine_options import EngineOptions  # noqa: E402
from vllm_flow.eval.sweep.machines import Pool  # noqa: E402
from vllm_flow.eval.sweep.schema import answers_table  # noqa: E402


class Echo:
    """Answers with the item's text."""

    def __init__(self, options: EngineOptions) -> None:
        self.name = f"host:{os.getpid()}"

    def __call__(self, work: pa.Table) -> pa.Table:
        return answers_table(
            [
                {
                    "task": item["task"],
                    "item_id": item["item_id"],
                    "policy": policy,
                    "answer": item["text"],
                    "engine": self.name,
                }
                for item in work.to_pylist()
                for policy in item["policies"]
            ]
        )


class NeverStarts(Echo):
    def __init__(self, options: EngineOptions) -> None:
        raise ValueError("no adapter for this model")


class Refused(Echo):
    """As where vLLM's configuration refuses an argument."""

    def __init__(self, options: EngineOptions) -> None:
        class Config(BaseModel):
            dtype: str

            @field_validator("dtype")
            @classmethod
            def check(cls, value: str) -> str:
                raise ValueError(f"dtype {value!r} is none of vLLM's; use 'auto'.")

        Config(dtype="foo")


class Fails(Echo):
    def __call__(self, work: pa.Table) -> pa.Table:
        raise RuntimeError("out of memory on the device")


class Dies(Echo):
    """Leaves a file behind each time."""

    def __init__(self, options: EngineOptions) -> None:
        self.folder = Path(options.engine_args["folder"])

    def __call__(self, work: pa.Table) -> pa.Table:
        (self.folder / str(os.getpid())).touch()
        os._exit(1)


def works(count: int, size: int) -> list[pa.Table]:
    from vllm_flow.eval.sweep.work import TaskWork, batches_of, plan_work
    from vllm_flow.eval.tasks.base import Item

    items = [Item(str(n), f"text {n}", None, {}) for n in range(count)]
    policies = small_options("baseline,cliff=2").policies
    return batches_of(plan_work([TaskWork("t", items, 4, "pad")], policies, set()), size)


OPTIONS = small_options("baseline,cliff=2")
TWO = Pool(engines=2, num_gpus=0, num_cpus=1)


def test_a_batch_stays_a_batch(cluster: str) -> None:
    """Batches neither merge nor split on their way: they are what is retried, written and lost."""
    tables = list(driver.answers(works(20, 3), OPTIONS, TWO, Echo))
    assert sorted(table.num_rows for table in tables) == [4, *[6] * 6]
    ids = sorted(int(i) for table in tables for i in table["item_id"].to_pylist())
    assert ids == sorted([*range(20), *range(20)])
    assert tables[0].schema.names == answers_table([]).schema.names


@pytest.mark.parametrize(
    ("actor", "says"),
    [
        (NeverStarts, "an engine could not start: ValueError: no adapter for this model$"),
        (Refused, "an engine could not start: dtype 'foo' is none of vLLM's; use 'auto'.$"),
        (Fails, "an engine failed: RuntimeError: out of memory on the device$"),
    ],
)
def test_engines_that_fail_say_why(cluster: str, actor: type, says: str) -> None:
    with pytest.raises(SweepError, match=says):
        list(driver.answers(works(2, 1), OPTIONS, Pool(1, 0, 1), actor))


def test_a_batch_that_kills_every_engine_ends_the_run(cluster: str, tmp_path: Path) -> None:
    options = small_options("baseline", engine_args={"folder": str(tmp_path)})
    with pytest.raises(SweepError, match="an engine died"):
        list(driver.answers(works(1, 1), options, Pool(1, 0, 1), Dies))
    assert len(list(tmp_path.iterdir())) == 1 + driver.RETRIES
