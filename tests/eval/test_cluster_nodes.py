"""A sweep on a cluster of several nodes, each started by `ray start` with an object store of its own: one is cut
off in mid-run, another joins, and the command comes from `ray job submit`. All of them on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.fixtures import prepare_process

prepare_process()
ray = pytest.importorskip("ray")

from tests.eval.demo_pope import write_pope  # noqa: E402
from tests.eval.test_driver import rows_of, wait_for, written  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]

POLICIES = "baseline,cliff=2,cliff=4,text-only"
QUESTIONS = 120


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""A cluster's secret, which every process shows that talks to it: Ray asks for one unless it is told not to."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Node:
    """A node of one processor, started as on a machine of its own."""

    def __init__(self, *more: str) -> None:
        ports = [free_port() for _ in range(3)]
        self.log = tempfile.NamedTemporaryFile(prefix="ray-node-", suffix=".log", delete=False)  # noqa: SIM115
        self.block = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"),
                *("--object-store-memory=100000000", "--disable-usage-stats"),
                f"--dashboard-agent-listen-port={ports[0]}",
                f"--dashboard-agent-grpc-port={ports[1]}",
                f"--metrics-export-port={ports[2]}",
                *more,
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ | TOKEN,
        )

    def processes(self) -> list[psutil.Process]:
        try:
            return [psutil.Process(self.block.pid), *psutil.Process(self.block.pid).children(True)]
        except psutil.NoSuchProcess:
            return []

    def runs(self, pid: int) -> bool:
        return pid in {process.pid for process in self.processes()}

    def cut_off(self) -> None:
        """Everything at once, as when the power goes."""
        there = self.processes()
        for process in there:
            process.suspend()
        for process in there:
            process.send_signal(signal.SIGKILL)
        self.block.wait(30)

    def joined(self) -> bool:
        assert self.block.poll() is None, self.said()
        return "Ray runtime started" in self.said()

    def said(self) -> str:
        return Path(self.log.name).read_text(errors="replace")


class Cluster:
    """A head and the nodes that joined it."""

    def __init__(self, dashboard: bool = False) -> None:
        self.port, self.dashboard = free_port(), free_port()
        # Sockets have short names.
        self.folder = tempfile.mkdtemp(prefix="fl", dir="/tmp")
        self.nodes = [
            Node(
                *("--head", f"--port={self.port}", f"--temp-dir={self.folder}"),
                f"--ray-client-server-port={free_port()}",
                f"--include-dashboard={str(dashboard).lower()}",
                f"--dashboard-port={self.dashboard}",
            )
        ]
        wait_for(self._listens, 120)

    @property
    def address(self) -> str:
        return f"{self._host()}:{self.port}"

    def _host(self) -> str:
        return str(ray.util.get_node_ip_address())

    def _listens(self) -> bool:
        assert self.nodes[0].block.poll() is None, self.nodes[0].said()
        try:
            socket.create_connection((self._host(), self.port), 1).close()
            return True
        except OSError:
            return False

    def join(self) -> Node:
        self.nodes.append(Node(f"--address={self.address}"))
        return self.nodes[-1]

    def end(self) -> None:
        for node in self.nodes[::-1]:
            if node.block.poll() is None:
                node.cut_off()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pope(tmp_path / "data" / "pope", QUESTIONS)
    return tmp_path / "data"


def sweep(data: Path, out: Path, *more: str) -> list[str]:
    """One request at a time, so that nodes have the time to come and go."""
    return [
        *(sys.executable, "-m", "vllm_flow.cli", "eval", "--model", "demo-small"),
        *("--tasks", "pope", "--data", str(data), "--out", str(out), "--policies", POLICIES),
        *("--group-layers", "2", "--max-model-len", "256", "--kv-cache-gib", "0.06"),
        *("--batch", "2", "--engine-args", json.dumps({"max_num_seqs": 1}), *more),
    ]


def engines(out: Path) -> set[int]:
    """Process ids of those that answered so far."""
    if not (out / "run.json").exists() or not written(out):
        return set()
    return {int(row["engine"].rpartition(":")[2]) for row in rows_of(out) if row["engine"]}


def check_complete(out: Path) -> list[dict[str, Any]]:
    rows = rows_of(out)
    keys = {(row["item_id"], row["policy"]) for row in rows}
    assert len(rows) == len(keys) == QUESTIONS * len(POLICIES.split(","))
    assert not [row["error"] for row in rows if row["error"]]
    return rows


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    ray.shutdown()
    started = Cluster()
    yield started
    started.end()


def test_a_node_is_cut_off_and_another_joins(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    second = cluster.join()
    wait_for(second.joined, 120)
    asked = sweep(data, out, "--engines", "2", "--ray-address", cluster.address)
    output = tmp_path / "output"
    with output.open("w") as file:
        child = subprocess.Popen(asked, stdout=file, stderr=file, env=os.environ | TOKEN)
    try:

        def answered_on(node: Node) -> bool:
            assert child.poll() is None, (
                f"it ended too early to show anything: {output.read_text()}"
            )
            return any(node.runs(pid) for pid in engines(out))

        wait_for(lambda: answered_on(second), 240)
        wait_for(lambda: answered_on(cluster.nodes[0]), 240)
        lost = {pid for pid in engines(out) if second.runs(pid)}
        before = rows_of(out)
        second.cut_off()
        third = cluster.join()
        wait_for(lambda: answered_on(third), 240)
        child.wait(400)
    finally:
        child.kill()
    assert child.returncode == 0, output.read_text()
    rows = check_complete(out)
    kept = {(row["item_id"], row["policy"]): row for row in rows}
    assert all(kept[row["item_id"], row["policy"]] == row for row in before)
    assert len({row["engine"] for row in rows}) >= 3 and lost


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
            *("--address", f"http://127.0.0.1:{cluster.dashboard}", "--"),
            *sweep(data, out, "--engines", "2"),
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
        check_complete(out)
        pids = {int(row["engine"].rpartition(":")[2]) for row in rows_of(out)}
        assert len(pids) == 2
    finally:
        cluster.end()
