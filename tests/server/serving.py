"""Starts OpenAI-compatible servers in processes of their own. Knows no model and no policy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

START_LOOKS = 1200
"""Times that a server is looked for before its start counts as failed, half a second apart. A machine that stood still
in between, as virtual ones do, has not looked. Beside two others a server has taken 160 seconds on a slow processor."""
NAME = "model"
"""The name under which every test's server serves its model."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    # vLLM compiles the counting of logprob ranks: seconds for a comparison of a few floats.
    "TORCHDYNAMO_DISABLE": "1",
    # Whoever hangs says where when it is aborted.
    "PYTHONFAULTHANDLER": "1",
}


class Server:
    """A running server."""

    def __init__(self, model_dir: Path, url: str) -> None:
        self.model_dir = model_dir
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=120)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Everything on ``/metrics``: (name, labels but the model's name and the engine) -> value."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            (
                sample.name,
                tuple(
                    (label, value)
                    for label, value in sorted(sample.labels.items())
                    if label not in ("model_name", "engine")
                ),
            ): sample.value
            for family in families
            for sample in family.samples
        }

    def metric(self, name: str) -> float:
        """A metric without labels of its own."""
        return self.samples()[(name, ())]

    def wait_until(self, name: str, value: float, seconds: float = 20) -> None:
        """Wait for a metric to reach a value; fails the test with what it was."""
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.1)


def environment() -> dict[str, str]:
    """A server's environment; the engine runs in a process of its own, as it does for users."""
    found = os.environ | ENVIRONMENT
    found.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serve(
    model_dir: Path, arguments: Sequence[str], log: Path, more: Mapping[str, str] = {}
) -> Iterator[Server]:
    """A server for ``model_dir`` with eager float32 on blocks of 32 tokens, and ``arguments``.

    ``more``: what its environment has beside what every server's has.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_dir), "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--dtype", "float32", "--block-size", "32"),
        *arguments,
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**environment(), **more}, start_new_session=True
        )
    running = Server(model_dir, f"http://127.0.0.1:{port}")
    try:
        _wait_until_healthy(running, process, log)
        yield running
        assert process.poll() is None, f"the server died:\n{log.read_text()[-3000:]}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        running.client.close()


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_LOOKS):
        if process.poll() is not None:
            break
        try:
            if server.client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.5)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGABRT)
        process.wait(60)
    pytest.fail(f"the server did not start:\n{log.read_text()[-12000:]}")
