"""A sweep on a cluster of several nodes: one is cut off in mid-run, all are, another joins, and the command comes
from `ray job submit`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fixtures import prepare_process

prepare_process()
ray = pytest.importorskip("ray")

from tests.eval import fake_engine, slow_engine  # noqa: E402
from tests.eval.demo_pope import write_pope  # noqa: E402
from tests.eval.nodes import TOKEN, Cluster, Node  # noqa: E402
from tests.eval.test_driver import rows_of, wait_for, written  # noqa: E402
from vllm_flow.eval.sweep.checked import RunError  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]

POLICIES = "baseline,cliff=2,cliff=4,text-only"
QUESTIONS = 120
REAL, FAKE = slow_engine.__name__, fake_engine.__name__


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pope(tmp_path / "data" / "pope", QUESTIONS)
    return tmp_path / "data"


def sweep(module: str, data: Path, out: Path, *more: str) -> list[str]:
    """Slowly, so that nodes have the time to come and go: three seconds per batch of two questions."""
    slowly = {"max_num_seqs": 1} if module == REAL else {"seconds": slow_engine.SECONDS / 2}
    return [
        *(sys.executable, "-m", module, "eval", "--model", "demo-small"),
        *("--tasks", "pope", "--data", str(data), "--out", str(out), "--policies", POLICIES),
        *("--group-layers", "2", "--max-model-len", "256", "--kv-cache-gib", "0.06"),
        *("--batch", "2", "--engine-args", json.dumps(slowly), *more),
    ]


class Sweep:
    """A sweep on its way."""

    def __init__(self, cluster: Cluster, module: str, data: Path, out: Path) -> None:
        self.out, self.output = out, out.with_suffix(".said")
        asked = sweep(module, data, out, "--engines", "2", "--ray-address", cluster.address)
        with self.output.open("w") as file:
            environment = os.environ | TOKEN | {"VLLM_FLOW_TEST_PATIENCE": "5"}
            self.child = subprocess.Popen(asked, stdout=file, stderr=file, env=environment)

    def said(self) -> str:
        return self.output.read_text()

    def answered_on(self, *nodes: Node) -> bool:
        """Whether each of these has given an answer."""
        try:
            rows = (
                rows_of(self.out) if (self.out / "run.json").exists() and written(self.out) else []
            )
        except RunError:  # when it ends, it makes one file of all
            self.child.wait(30)
        assert self.child.poll() is None, f"it ended too early to show anything: {self.said()}"
        pids = {int(row["engine"].rpartition(":")[2]) for row in rows if row["engine"]}
        return all(any(node.runs(pid) for pid in pids) for node in nodes)

    def ended(self, status: int) -> list[dict[str, Any]]:
        """The rows, once it has ended with this status."""
        assert self.child.wait(400) == status, self.said()
        return rows_of(self.out)


@pytest.fixture
def sweeps() -> Iterator[list[Sweep]]:
    """Those in it end with the test."""
    started: list[Sweep] = []
    yield started
    for one in started:
        one.child.kill()


def check_complete(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Nothing is lost, nothing doubled, and what was answered before stayed."""
    kept = {(row["item_id"], row["policy"]): row for row in rows}
    assert len(rows) == len(kept) == QUESTIONS * len(POLICIES.split(","))
    assert not [row["error"] for row in rows if row["error"]]
    assert before and all(kept[row["item_id"], row["policy"]] == row for row in before)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Its head has room for one engine, or for as many as the parameter says."""
    ray.shutdown()
    started = Cluster(cpus=getattr(request, "param", 1))
    yield started
    started.end()


@pytest.mark.parametrize("module", [FAKE, REAL])
def test_a_node_is_cut_off_and_another_joins(
    module: str, cluster: Cluster, sweeps: list[Sweep], data: Path, tmp_path: Path
) -> None:
    second = cluster.join()
    wait_for(second.joined, 120)
    sweeps.append(run := Sweep(cluster, module, data, tmp_path / "run"))
    wait_for(lambda: run.answered_on(cluster.nodes[0], second))
    before = rows_of(run.out)
    second.cut_off()
    third = cluster.join()
    wait_for(lambda: run.answered_on(third))
    rows = run.ended(0)
    check_complete(rows, before)
    assert len({row["engine"] for row in rows}) >= 3


@pytest.mark.parametrize("cable", [False, True], ids=["processes", "power"])
def test_a_node_is_cut_off_and_the_other_goes_on(
    cable: bool, cluster: Cluster, sweeps: list[Sweep], data: Path, tmp_path: Path
) -> None:
    """Where connections are refused, Ray's retries are spent in seconds, and what is left is planned anew. Where nobody
    answers, Ray waits until it misses heartbeats, and may find room for the engine itself when the other is idle."""
    second = cluster.join()
    wait_for(second.joined, 120)
    sweeps.append(run := Sweep(cluster, FAKE, data, tmp_path / "run"))
    wait_for(lambda: run.answered_on(cluster.nodes[0], second))
    before = rows_of(run.out)
    second.cut_off(cable)
    check_complete(run.ended(0), before)
    if not cable:
        assert "A machine of the cluster is gone." in run.said()
        assert "starting 1 of 2 engines, more when a machine with room for one joins" in run.said()


@pytest.mark.parametrize("cluster", [0], indirect=True)
def test_every_node_with_room_goes_and_others_come(
    cluster: Cluster, sweeps: list[Sweep], data: Path, tmp_path: Path
) -> None:
    """A sweep begins with one of two engines, gets the other, loses both, says so; the same command goes on."""
    first = cluster.join()
    wait_for(first.joined, 120)
    sweeps.append(run := Sweep(cluster, FAKE, data, tmp_path / "run"))
    wait_for(lambda: run.answered_on(first))
    assert "starting 1 of 2 engines" in run.said()
    second = cluster.join()
    wait_for(lambda: run.answered_on(first, second))
    for node in (first, second):
        node.cut_off()
    before = run.ended(1)
    assert run.said().count("\nvllm-flow eval: ") == 1
    assert (
        "vllm-flow eval: no machine of the cluster has room for an engine (1 CPU) any more; the "
        f"answers so far are in {run.out}, and the same command goes on.\n"
    ) in run.said()
    third = cluster.join()
    wait_for(third.joined, 120)
    sweeps.append(run := Sweep(cluster, FAKE, data, tmp_path / "run"))
    check_complete(run.ended(0), before)


@pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None, reason="jobs need ray[default]"
)
def test_a_driver_that_was_submitted_as_a_job(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ray.shutdown()
    cluster = Cluster(dashboard=True)
    try:
        wait_for(cluster.join().joined, 120)
        job = [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit"),
            *("--address", f"http://{cluster.host}:{cluster.dashboard}", "--"),
            *sweep(REAL, data, out, "--engines", "2"),
        ]
        environment = os.environ | TOKEN | {"RAY_ADDRESS": ""}

        def submitted() -> subprocess.CompletedProcess[str] | None:
            done = subprocess.run(
                job, capture_output=True, text=True, env=environment, timeout=600, check=False
            )
            return done if "Failed to connect" not in done.stdout + done.stderr else None

        done = wait_for(submitted, 120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "succeeded" in done.stdout
        rows = rows_of(out)
        check_complete(rows, rows)
        assert len({row["engine"] for row in rows}) == 2
    finally:
        cluster.end()
