"""A Ray cluster of several machines on this one: nodes by `ray start`, each with an object store of its own.

Where this process may make network namespaces (root), every node but the head is in one, with an address and a
cable of its own: a machine that loses its power answers nothing, not even that nobody listens any more.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import psutil

from tests.eval.test_driver import wait_for

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""A cluster's secret, which every process shows that talks to it: Ray asks for one unless it is told not to."""

SUBNET = "10.213.77"


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)


class Network:
    """A switch, and a namespace per machine that is plugged into it."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]  # interfaces have names of 15 characters at most
        self.switch, self.tag, self.count = f"flw{tag}", tag, 0
        ip("link", "add", self.switch, "type", "bridge")
        ip("addr", "add", f"{SUBNET}.1/24", "dev", self.switch)
        ip("link", "set", self.switch, "up")

    @staticmethod
    def possible() -> bool:
        try:
            made = Network()
        except (OSError, subprocess.CalledProcessError):
            return False
        made.end()
        return True

    def plug(self) -> tuple[str, str, str]:
        """A new machine's namespace, its end of the cable at the switch, and its address."""
        self.count += 1
        space = f"flw{self.tag}{self.count}"
        cable, address = f"v{space}", f"{SUBNET}.{self.count + 1}"
        ip("netns", "add", space)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", cable, "master", self.switch, "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")
        return space, cable, address

    def end(self) -> None:
        for number in range(1, self.count + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", f"flw{self.tag}{number}")
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", self.switch)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Node:
    """A node, started as on a machine of its own."""

    def __init__(self, *more: str, cpus: int = 1, cable: str = "", inside: str = "") -> None:
        ports = [free_port() for _ in range(3)]
        self.cable = cable
        self.log = tempfile.NamedTemporaryFile(prefix="ray-node-", suffix=".log", delete=False)  # noqa: SIM115
        self.block = subprocess.Popen(
            [
                *(("ip", "netns", "exec", inside) if inside else ()),
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                *(f"--num-cpus={cpus}", "--object-store-memory=100000000"),
                f"--dashboard-agent-listen-port={ports[0]}",
                f"--dashboard-agent-grpc-port={ports[1]}",
                f"--metrics-export-port={ports[2]}",
                *("--disable-usage-stats", *more),
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

    def cut_off(self, cable: bool = True) -> None:
        """Everything at once, as when the power goes; with its cable left in, the system still refuses connections."""
        if self.cable and cable:
            ip("link", "set", self.cable, "down")
        there = self.processes()
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            for process in there:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(sent)
        self.block.wait(30)

    def joined(self) -> bool:
        assert self.block.poll() is None, self.said()
        return "Ray runtime started" in self.said()

    def said(self) -> str:
        return Path(self.log.name).read_text(errors="replace")


class Cluster:
    """A head, and the nodes that joined it."""

    def __init__(self, cpus: int = 1, dashboard: bool = False) -> None:
        """`cpus` of the head; 0 has no room for engines."""
        self.port, self.dashboard = free_port(), free_port()
        self.network = Network() if Network.possible() else None
        self.host = f"{SUBNET}.1" if self.network else "127.0.0.1"
        # Sockets have short names.
        self.folder = tempfile.mkdtemp(prefix="fl", dir="/tmp")
        self.nodes = [
            Node(
                *("--head", f"--port={self.port}", f"--temp-dir={self.folder}"),
                f"--node-ip-address={self.host}",
                f"--ray-client-server-port={free_port()}",
                f"--include-dashboard={str(dashboard).lower()}",
                *(f"--dashboard-port={self.dashboard}", f"--dashboard-host={self.host}"),
                cpus=cpus,
            )
        ]
        wait_for(self._listens, 120)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def _listens(self) -> bool:
        assert self.nodes[0].block.poll() is None, self.nodes[0].said()
        try:
            socket.create_connection((self.host, self.port), 1).close()
            return True
        except OSError:
            return False

    def join(self) -> Node:
        """Another machine, which takes some seconds."""
        inside = cable = ""
        address = self.host
        if self.network:
            inside, cable, address = self.network.plug()
        joining = (f"--address={self.address}", f"--node-ip-address={address}")
        self.nodes.append(Node(*joining, cable=cable, inside=inside))
        return self.nodes[-1]

    def end(self) -> None:
        for node in self.nodes[::-1]:
            if node.block.poll() is None:
                node.cut_off()
            Path(node.log.name).unlink()
        if self.network:
            self.network.end()
        shutil.rmtree(self.folder, ignore_errors=True)
